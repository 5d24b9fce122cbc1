"""What the machine's metadata server says: who it is, and what comes."""

import http.client
import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable

_TIMEOUT = 5.0

PREEMPTED = 'the machine is being preempted'
MAINTENANCE = 'the machine is going down for maintenance'


def get(path: str) -> str | None:
  """A value below `computeMetadata/v1/`; None where there is none."""
  host = os.environ.get('GCE_METADATA_HOST', 'metadata.google.internal')
  request = urllib.request.Request(
    f'http://{host}/computeMetadata/v1/{path}',
    headers={'Metadata-Flavor': 'Google'},
  )
  # It is on the machine itself, whatever the proxy of the rest.
  opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  try:
    with opener.open(request, timeout=_TIMEOUT) as reply:
      return reply.read().decode()
  except (OSError, http.client.HTTPException):
    return None


def token() -> str:
  """An access token of the machine's service account.

  Raises:
    OSError: there is none.
  """
  text = get('instance/service-accounts/default/token')
  if text is None:
    raise OSError('the machine has no service account')
  return json.loads(text)['access_token']


def notice() -> str | None:
  """Why this machine is about to go, if it is."""
  if get('instance/preempted') == 'TRUE':
    return PREEMPTED
  if get('instance/maintenance-event') == 'TERMINATE_ON_HOST_MAINTENANCE':
    return MAINTENANCE
  return None


def place() -> tuple[int, int]:
  """This host's slice, and its number in that; as JAX counts them.

  GKE says so by the environment, Cloud TPU by metadata.
  """
  tpu = get('instance/attributes/tpu-env') or ''
  found = dict(re.findall(r"^(\w+): *'?([^'\n]*)'?$", tpu, re.MULTILINE))
  found |= os.environ
  worker = found.get('TPU_WORKER_ID') or found.get('WORKER_ID')
  worker = worker or get('instance/attributes/agent-worker-number')
  return int(found.get('MEGASCALE_SLICE_ID') or 0), int(worker or 0)


class Watch(threading.Thread):
  """Asks again and again; tells each answer, once until it is withdrawn."""

  def __init__(
    self,
    ask: Callable[[], str | None],
    tell: Callable[[str], None],
    seconds: float,
  ):
    super().__init__(daemon=True)
    self._ask, self._tell, self._seconds = ask, tell, seconds
    self._end = threading.Event()

  def run(self) -> None:
    told = None
    while True:
      found = self._ask()
      if found and found != told:
        self._tell(found)
      told = found
      if self._end.wait(self._seconds):
        return

  def stop(self) -> None:
    self._end.set()
    self.join()


def delete(queued_resource: str) -> None:
  """Deletes a queued resource, this machine with it.

  Raises:
    OSError, HTTPException: it was refused.
  """
  tpu = os.environ.get(
    'CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU', 'https://tpu.googleapis.com/'
  )
  request = urllib.request.Request(
    f'{tpu}v2/{queued_resource}?force=true',
    headers={'Authorization': f'Bearer {token()}'},
    method='DELETE',
  )
  urllib.request.urlopen(request, timeout=60).close()
