"""Queued resources of Cloud TPU: built, sent, looked at, deleted, sent again."""

import time
from collections.abc import Callable
from typing import Any

from gsae_jax.errors import UserError
from launch.patience import Unreachable
from launch.specs import TpuSpec

try:
  from google.api_core import exceptions
  from google.auth.exceptions import (
    GoogleAuthError,
    RefreshError,
    TransportError,
  )
  from google.cloud import tpu_v2
  from google.protobuf import json_format
except ImportError as e:
  raise UserError(
    "the client of Cloud TPU is missing; in the clone: pip install '.[launch]'"
  ) from e

ABSENT = 'ABSENT'  # As a state: there is no such request.
# States out of which a request does not come back by itself.
LOST = ('SUSPENDED', 'FAILED')
_SCOPE = 'https://www.googleapis.com/auth/cloud-platform'
_POLL = 2.0


def full_name(request: dict[str, Any]) -> str:
  """Of what a request, as JSON, asks for."""
  return f'{request["parent"]}/queuedResources/{request["queuedResourceId"]}'


def name_of(spec: TpuSpec, run: str) -> str:
  return f'{spec.parent}/queuedResources/{run}'


def build(
  spec: TpuSpec, run: str, script: str
) -> 'tpu_v2.CreateQueuedResourceRequest':
  """The request for the machines of a run."""
  node = tpu_v2.Node(
    accelerator_type=spec.slice.accelerator_type,
    runtime_version=spec.runtime,
    metadata={'startup-script': script},
    service_account=tpu_v2.ServiceAccount(
      email=spec.service_account or '', scope=[_SCOPE]
    ),
    network_config=tpu_v2.NetworkConfig(
      network=spec.network or 'default', enable_external_ips=True
    ),
  )
  node_spec = tpu_v2.QueuedResource.Tpu.NodeSpec(parent=spec.parent, node=node)
  if spec.slices > 1:
    node_spec.multislice_params = (
      tpu_v2.QueuedResource.Tpu.NodeSpec.MultisliceParams(
        node_count=spec.slices, node_id_prefix=run
      )
    )
  else:
    node_spec.node_id = run
  resource = tpu_v2.QueuedResource(
    tpu=tpu_v2.QueuedResource.Tpu(node_spec=[node_spec])
  )
  if spec.spot:
    resource.spot = tpu_v2.QueuedResource.Spot()
  if spec.valid_hours:
    resource.queueing_policy = tpu_v2.QueuedResource.QueueingPolicy(
      valid_until_duration={'seconds': spec.valid_hours * 3600}
    )
  return tpu_v2.CreateQueuedResourceRequest(
    parent=spec.parent, queued_resource_id=run, queued_resource=resource
  )


def to_json(request: 'tpu_v2.CreateQueuedResourceRequest') -> dict[str, Any]:
  return json_format.MessageToDict(type(request).pb(request))


def from_json(value: dict[str, Any]) -> 'tpu_v2.CreateQueuedResourceRequest':
  """The request that `to_json` wrote.

  Raises:
    UserError: it has other fields than a request.
  """
  request = tpu_v2.CreateQueuedResourceRequest()
  try:
    json_format.ParseDict(value, type(request).pb(request))
  except json_format.ParseError as e:
    raise UserError(f'launch.json of the run is not a request ({e})') from e
  return request


def gcloud_line(spec: TpuSpec, run: str) -> str:
  """The same request, for whoever likes to see it or type it."""
  parts = [
    'gcloud compute tpus queued-resources create', run,
    f'--project={spec.project}', f'--zone={spec.zone}',
    f'--accelerator-type={spec.slice.accelerator_type}',
    f'--runtime-version={spec.runtime}',
  ]  # fmt: skip
  if spec.slices > 1:
    parts += [f'--node-count={spec.slices}', f'--node-prefix={run}']
  else:
    parts.append(f'--node-id={run}')
  if spec.spot:
    parts.append('--spot')
  if spec.valid_hours:
    parts.append(f'--valid-until-duration={spec.valid_hours}h')
  if spec.service_account:
    parts.append(f'--service-account={spec.service_account}')
  if spec.network:
    parts.append(f'--network={spec.network}')
  parts.append(f'--scopes={_SCOPE}')
  parts.append('--metadata-from-file=startup-script=startup.sh')
  return ' '.join(parts)


class Cloud:
  """What is asked of Cloud TPU; its refusals are UserErrors of one line."""

  def __init__(self, client=None, pause: Callable[[float], None] = time.sleep):
    """Connects.

    Args:
      client: None makes one with the credentials of the user.
      pause: waits so many seconds, while machines go.
    """
    self._pause = pause
    try:
      self._client = client or tpu_v2.TpuClient()
    except GoogleAuthError as e:
      raise UserError(_no_credentials(e)) from e

  def _call(self, method: str, request):
    try:
      return getattr(self._client, method)(request=request)
    except (RefreshError, TransportError) as e:
      raise Unreachable(_no_credentials(e)) from e
    except (GoogleAuthError, exceptions.Unauthenticated) as e:
      raise UserError(_no_credentials(e)) from e
    except (exceptions.NotFound, exceptions.AlreadyExists):
      raise
    except (exceptions.PermissionDenied, exceptions.InvalidArgument) as e:
      raise UserError(_refusal(e)) from e
    except exceptions.GoogleAPIError as e:
      raise Unreachable(_refusal(e)) from e

  def state(self, name: str) -> tuple[str, str]:
    """The state of a queued resource, and what there is to say about it."""
    try:
      found = self._call('get_queued_resource', {'name': name})
    except exceptions.NotFound:
      return ABSENT, ''
    state = found.state
    return state.state.name, _line(state.failed_data.error.message)

  def make_room(self, name: str) -> None:
    """Deletes what is lost under a name.

    Raises:
      UserError: something else is there.
    """
    state, _ = self.state(name)
    if state in LOST:
      self.delete(name)
    elif state != ABSENT:
      raise UserError(
        f'--run: {name} is there and {state}; watch it, or delete it first'
      )

  def create(self, request: 'tpu_v2.CreateQueuedResourceRequest') -> None:
    """Sends a request.

    Raises:
      UserError: it is refused.
    """
    try:
      self._call('create_queued_resource', request)
    except (exceptions.AlreadyExists, exceptions.NotFound) as e:
      raise UserError(_refusal(e)) from e

  def delete(self, name: str) -> None:
    """Deletes a queued resource and its machines; returns when it is gone."""
    try:
      self._call('delete_queued_resource', {'name': name, 'force': True})
      while self.state(name)[0] != ABSENT:
        self._pause(_POLL)
    except exceptions.NotFound:
      pass


def _line(text: str) -> str:
  lines = str(text).strip().splitlines()
  return lines[0][:300] if lines else ''


def _refusal(error: 'exceptions.GoogleAPIError') -> str:
  text = _line(getattr(error, 'message', str(error)))
  return f'Cloud TPU refuses ({type(error).__name__}): {text}'


def _no_credentials(error: Exception) -> str:
  return (
    f'no credentials for Google Cloud ({_line(str(error))}); run gcloud auth '
    'application-default login'
  )
