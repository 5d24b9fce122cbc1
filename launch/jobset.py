"""The manifest of a run on GKE: a JobSet, whose hosts start and restart as one."""

import dataclasses
from typing import Any

from gsae_jax.errors import PREEMPTED
from launch.specs import Slice

_GRACE = 120  # Seconds for a save; a preempted machine leaves it less.
_PORTS = (8471, 8482)  # Of the TPU runtime, and of JAX's coordinator.


@dataclasses.dataclass(frozen=True)
class JobSpec:
  """What a JobSet asks for.

  Attributes:
    slice: of each of `slices` Jobs.
    spot: on machines that may be taken away.
    queue: Kueue's LocalQueue; None without Kueue.
    image: with bash, curl and tar in it; the rest is installed.
    service_account: of Kubernetes, which may use the bucket.
  """

  slice: Slice
  slices: int
  spot: bool
  namespace: str
  queue: str | None
  image: str
  service_account: str | None


def manifest(spec: JobSpec, name: str, script: str) -> dict[str, Any]:
  """A JobSet whose containers run a start-up script.

  A container that leaves with the code of a preemption, or whose machine is
  taken away, makes all of them start again, as often as it happens; any other
  end but a good one ends the run, because the worker has tried by itself.
  """
  metadata = {
    'name': name,
    'namespace': spec.namespace,
    'annotations': {
      # A slice belongs to one Job.
      'alpha.jobset.sigs.k8s.io/exclusive-topology': (
        'cloud.google.com/gke-nodepool'
      )
    },
  }
  if spec.queue:
    metadata['labels'] = {'kueue.x-k8s.io/queue-name': spec.queue}
  job = {
    'name': 'slice',
    'replicas': spec.slices,
    'template': {'spec': _job(spec, script)},
  }
  return {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2',
    'kind': 'JobSet',
    'metadata': metadata,
    'spec': {
      'failurePolicy': {
        'maxRestarts': 0,
        'rules': [
          {
            'name': 'preempted',
            'action': 'RestartJobSetAndIgnoreMaxRestarts',
            'onJobFailureReasons': ['PodFailurePolicy'],
          }
        ],
      },
      'replicatedJobs': [job],
    },
  }


def _job(spec: JobSpec, script: str) -> dict[str, Any]:
  hosts = spec.slice.hosts
  return {
    'parallelism': hosts,
    'completions': hosts,
    'completionMode': 'Indexed',
    'backoffLimit': 0,
    'podFailurePolicy': {
      'rules': [
        {
          'action': 'FailJob',
          'onExitCodes': {
            'containerName': 'worker',
            'operator': 'In',
            'values': [PREEMPTED],
          },
        },
        {
          'action': 'FailJob',
          'onPodConditions': [{'type': 'DisruptionTarget', 'status': 'True'}],
        },
      ]
    },
    'template': {'spec': _pod(spec, script)},
  }


def _pod(spec: JobSpec, script: str) -> dict[str, Any]:
  selector = {
    'cloud.google.com/gke-tpu-accelerator': spec.slice.gke,
    'cloud.google.com/gke-tpu-topology': spec.slice.topology,
  }
  if spec.spot:
    selector['cloud.google.com/gke-spot'] = 'true'
  chips = {'google.com/tpu': str(spec.slice.chips_per_host)}
  pod: dict[str, Any] = {
    'restartPolicy': 'Never',
    'terminationGracePeriodSeconds': _GRACE,
    'nodeSelector': selector,
    'tolerations': [
      {'key': 'google.com/tpu', 'operator': 'Exists', 'effect': 'NoSchedule'}
    ],
    'containers': [
      {
        'name': 'worker',
        'image': spec.image,
        'command': ['bash', '-c', script],
        'ports': [
          {'containerPort': port, 'protocol': 'TCP'} for port in _PORTS
        ],
        'resources': {'requests': chips, 'limits': dict(chips)},
      }
    ],
  }
  if spec.spot:
    pod['tolerations'].append(
      {
        'key': 'cloud.google.com/gke-spot',
        'operator': 'Equal',
        'value': 'true',
        'effect': 'NoSchedule',
      }
    )
  if spec.service_account:
    pod['serviceAccountName'] = spec.service_account
  return pod
