"""Several processes as one: they start, agree, fail and leave together."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from gsae_jax.errors import Preempted, UserError

_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  "For several processes: 'auto' on Cloud TPU, GKE and Slurm, else the "
  'host:port of process 0, with --processes and --process.',
)
_PROCESSES = flags.DEFINE_integer('processes', None, 'How many there are.')
_PROCESS = flags.DEFINE_integer('process', None, 'Which one this is.')

_FINE, _PREEMPTED, _FAILED = range(3)


def initialize() -> None:
  """Joins the other processes, if the flags say that there are any.

  Raises:
    UserError: the flags do not fit together, or the others cannot be reached.
  """
  place, count, index = _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
  if place is None:
    if count is not None or index is not None:
      raise UserError('--processes and --process need --coordinator=host:port')
    return
  explicit = {}
  if place != 'auto':
    if count is None or index is None or not 0 <= index < count:
      raise UserError(
        f'--coordinator={place} needs --processes=N and --process=0 to N-1'
      )
    explicit = {
      'coordinator_address': place,
      'num_processes': count,
      'process_id': index,
    }
  try:
    jax.distributed.initialize(**explicit)
  except (ValueError, RuntimeError) as e:
    raise UserError(f'--coordinator={place}: {str(e).splitlines()[0]}') from e


@contextlib.contextmanager
def together() -> Iterator[None]:
  """When the block fails or is preempted on one process, it does so on all.

  Every process must come to the same blocks in the same order.
  """
  error, status = None, _FINE
  try:
    yield
  except Preempted as e:
    error, status = e, _PREEMPTED
  except Exception as e:
    error, status = e, _FAILED
  if jax.process_count() > 1:
    everybody = multihost_utils.process_allgather(np.int32(status))
    status = int(np.max(everybody))
  if error is not None:
    raise error
  if status == _PREEMPTED:
    raise Preempted
  if status == _FAILED:
    raise UserError('another process failed; its own message says why')


def agreed(values: np.ndarray) -> np.ndarray:
  """The values of process 0, everywhere."""
  if jax.process_count() == 1:
    return values
  return multihost_utils.broadcast_one_to_all(values)
