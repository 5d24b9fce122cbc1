"""Several processes as one: they start, agree, fail and leave together."""

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.errors import FAILED, PREEMPTED, Preempted, UserError

_FINE, _PREEMPTED, _FAILED = range(3)
_LAST_WORDS = 2.0  # Seconds.
# What JAX says where others did not come in time; they may be on their way.
_LATE = 'DEADLINE_EXCEEDED', 'UNAVAILABLE'


def define_flags(values: flags.FlagValues) -> None:
  """Adds the flags of `initialize`."""
  flags.DEFINE_string(
    'coordinator',
    None,
    "For several processes: 'auto' on Cloud TPU, GKE and Slurm, else the "
    'host:port of process 0, with --processes and --process.',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'processes', None, 'How many there are.', flag_values=values
  )
  flags.DEFINE_integer(
    'process', None, 'Which one this is.', flag_values=values
  )


def initialize(given: flags.FlagValues) -> None:
  """Joins the other processes, if the flags say that there are any.

  Raises:
    UserError: the flags do not fit together, or to the machine.
  """
  place, count, index = given.coordinator, given.processes, given.process
  if place is None:
    if count is not None or index is not None:
      raise UserError('--processes and --process need --coordinator=host:port')
    return
  explicit: dict[str, Any] = {}
  if place == 'auto' and (count is not None or index is not None):
    raise UserError('--coordinator=auto finds --processes and --process itself')
  if place != 'auto':
    if count is None or index is None or not 0 <= index < count:
      raise UserError(
        f'--coordinator={place} needs --processes=N and --process=0 to N-1'
      )
    if not re.fullmatch(r'.+:\d+', place):
      raise UserError(f'--coordinator: {place!r} is not HOST:PORT')
    explicit = {
      'coordinator_address': place,
      'num_processes': count,
      'process_id': index,
    }
  try:
    jax.distributed.initialize(**explicit)
  except (ValueError, RuntimeError) as e:
    if isinstance(e, RuntimeError) and any(late in str(e) for late in _LATE):
      _leave(e)
    raise UserError(f'--coordinator={place}: {str(e).splitlines()[0]}') from e


@contextlib.contextmanager
def together() -> Iterator[None]:
  """When the block fails or is preempted on one process, it does so on all.

  Every process must come to the same blocks in the same order.
  """
  error: Exception | None = None
  status = _FINE
  try:
    yield
  except Preempted as e:
    error, status = e, _PREEMPTED
  except Exception as e:
    error, status = e, _FAILED
  if jax.process_count() > 1:
    status = int(np.max(_exchange(np.int32(status))))
  if error is not None:
    raise error
  if status == _PREEMPTED:
    raise Preempted
  if status == _FAILED:
    raise UserError('another process failed; its own message says why')


def _exchange(value: np.ndarray | np.int32) -> np.ndarray:
  """Everybody's value; ends this process when another one is gone."""
  try:
    return multihost_utils.process_allgather(value)
  except Exception as e:  # Each transport raises an error of its own.
    _leave(e)


def _leave(e: Exception) -> NoReturn:
  print(
    f'error: another process is gone ({str(e).splitlines()[0][:200]}); the '
    'same command goes on',
    file=sys.stderr,
    flush=True,
  )
  # JAX would wait for the other at its shutdown, and then abort.
  os._exit(PREEMPTED)


@contextlib.contextmanager
def leaving_with_the_others() -> Iterator[None]:
  """One of several processes that fails in the block ends at once.

  The others are in the middle of a computation with it, which fails when it is
  gone, and so they end too. To leave in good order would be to wait for them.
  """
  try:
    yield
  except Preempted:
    raise
  except Exception as e:
    if jax.process_count() == 1:
      raise
    lost = isinstance(e, jax.errors.JaxRuntimeError)
    if lost and 'RESOURCE_EXHAUSTED' not in str(e):
      _leave(e)
    if isinstance(e, UserError | OSError):
      print(f'error: {e}', file=sys.stderr, flush=True)
    else:
      traceback.print_exc()
    if jax.process_index() == 0:  # Without it, JAX aborts those who still talk.
      time.sleep(_LAST_WORDS)
    os._exit(FAILED)


def agreed(values: np.ndarray | np.int32) -> Any:
  """The values of process 0, everywhere."""
  if jax.process_count() == 1:
    return values
  return _exchange(values)[0]


def gathered(tree: Any) -> Any:
  """A tree of arrays, of every process, along a new first axis; bit for bit."""
  if jax.process_count() == 1:
    return jax.tree.map(lambda v: v[None], tree)

  def one(value):
    value = np.ascontiguousarray(value)
    # As words: JAX would make 32 bits of 64.
    words = _exchange(value.reshape(-1).view(np.uint32))
    return words.view(value.dtype).reshape(-1, *value.shape)

  return jax.tree.map(one, tree)


class Ballot:
  """Asks at each call whether any process says yes, and never waits for it.

  With several processes the answer is to the question of the call before: it
  was computed meanwhile, and is the same everywhere.
  """

  def __init__(self, ask: Callable[[], bool]):
    """Takes the question; every process must make the same calls."""
    self._ask = ask
    self._pending = None
    if jax.process_count() > 1:
      mesh = Mesh(np.array(jax.devices()), ('all',))
      self._votes = NamedSharding(mesh, P('all'))
      self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))

  def __call__(self) -> bool:
    mine = bool(self._ask())
    if jax.process_count() == 1:
      return mine
    votes = jax.make_array_from_process_local_data(
      self._votes,
      np.full(jax.local_device_count(), mine),
      (jax.device_count(),),
    )
    answer, self._pending = self._pending, self._any(votes)
    return answer is not None and bool(jax.device_get(answer))
