"""Checkpoints: Orbax, plain dictionaries of named arrays, JSON metadata.

    workdir/checkpoints/<step>/state      members/<name>/params/W_dec, ...
    workdir/checkpoints/<step>/metadata   schema, config, store, members

`params` are for raw activations: what `gsae_jax.load` gives is what is there.
"""

import logging
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from gsae_jax import checks, paths
from gsae_jax.activations.store import differences
from gsae_jax.errors import UserError

SCHEMA = 4


def _reason(e: Exception) -> str:
  first = next(iter(str(e).splitlines()), '')[:200]
  return f'{type(e).__name__}: {first}'


def _host() -> jax.Device:
  """Host memory, where all members have room together, if JAX is let use it."""
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS names accelerators alone.
    return jax.local_devices()[0]


class _Preserved(preservation_policy.PreservationPolicy):
  """The latest few, every so many steps, and those that are pinned."""

  def __init__(self, latest: int | None, every: int | None, pinned: set[int]):
    self._latest = latest
    self._every = every
    self._pinned = pinned

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    steps = [c.step for c in checkpoints]
    late = set(steps if self._latest is None else steps[-self._latest :])
    return [
      s in late | self._pinned
      or (self._every is not None and s % self._every == 0)
      for s in steps
    ]


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(
    self,
    workdir: str,
    *,
    kept: int | None = None,
    keep_every: int | None = None,
    read_only: bool = False,
  ):
    """Opens the folder, and makes it unless `read_only`.

    Args:
      workdir: local folder or gs://.
      kept: how many of the latest to keep; None keeps all.
      keep_every: keep also those whose step is a multiple.
      read_only: never write; the folder must exist.

    Raises:
      UserError: the place cannot be read or written, or is on s3://.
    """
    self.path = paths.workdir(workdir) / 'checkpoints'
    if read_only and not self.path.exists():
      raise UserError(
        f'--workdir: no checkpoints at {self.path}; run gsae_jax.train first'
      )
    self._pinned: set[int] = set()
    absl_logger = logging.getLogger('absl')
    level = absl_logger.level
    if read_only:  # Of which Orbax would warn every reader.
      absl_logger.setLevel(logging.ERROR)
    try:
      options = ocp.CheckpointManagerOptions(
        preservation_policy=_Preserved(kept, keep_every, self._pinned),
        read_only=read_only,
        create=not read_only,
      )
      self._manager = ocp.CheckpointManager(
        self.path, options=options, item_names=('state', 'metadata')
      )
    except OSError as e:
      raise UserError(f'--workdir: cannot write {workdir}: {e.strerror}') from e
    finally:
      absl_logger.setLevel(level)

  def __enter__(self):
    return self

  def __exit__(self, error, *unused):
    try:
      self._manager.close()  # Waits for what is being saved.
    except Exception as e:
      if error is None:
        raise self._unsaved(e) from e

  def steps(self) -> list[int]:
    """Steps of the finished checkpoints, ascending."""
    self._manager.reload()
    return sorted(self._manager.all_steps())

  def pin(self, step: int) -> None:
    """Keeps a checkpoint whatever comes."""
    self._pinned.add(step)

  def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
    """Starts saving; the arrays may be donated as soon as this returns."""
    args = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(metadata)
    )
    try:
      self._manager.save(step, args=args, force=True)
    except Exception as e:  # Of this save, or of the one before.
      raise self._unsaved(e) from e

  def _unsaved(self, e: Exception) -> UserError:
    return UserError(
      f'--workdir: cannot save a checkpoint in {self.path} ({_reason(e)}); those '
      'before are good, and the same command goes on from the latest'
    )

  def metadata(self, step: int) -> dict[str, Any]:
    """What `save` was given beside the state.

    Raises:
      UserError: the schema is unknown.
    """
    metadata = self._read(step, metadata=ocp.args.JsonRestore())['metadata']
    if metadata.get('schema') != SCHEMA:
      raise UserError(
        f'{self.path}/{step} has schema {metadata.get("schema")}, and this '
        f'version reads {SCHEMA}; install the version that wrote it'
      )
    return metadata

  def restore(self, step: int, abstract: Any) -> Any:
    """Restores what `abstract` names, onto its shardings.

    Args:
      step: a finished one.
      abstract: a tree of `jax.ShapeDtypeStruct` with shardings; may leave out
        parts of what was saved, such as the optimizer state.
    """
    restore_args = jax.tree.map(
      lambda a: ocp.ArrayRestoreArgs(
        sharding=a.sharding, global_shape=a.shape, dtype=a.dtype
      ),
      abstract,
    )
    args = ocp.args.PyTreeRestore(
      item=abstract, restore_args=restore_args, partial_restore=True
    )
    return self._read(step, state=args)['state']

  def _read(self, step: int, **items) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as e:  # Orbax and TensorStore raise half a dozen kinds.
      raise UserError(
        f'--workdir: {self.path}/{step} cannot be read ({_reason(e)}); delete '
        'that folder to go on from the one before'
      ) from e

  def restore_params(
    self, step: int, members: dict[str, dict[str, list[int]]]
  ) -> dict[str, dict[str, np.ndarray]]:
    """Parameters of some members, on the host, whatever they were saved from.

    Args:
      step: a finished one.
      members: shape of each parameter, by member and name.
    """
    device = jax.sharding.SingleDeviceSharding(_host())
    abstract = {
      name: {
        'params': {
          k: jax.ShapeDtypeStruct(tuple(shape), np.float32, sharding=device)
          for k, shape in shapes.items()
        }
      }
      for name, shapes in members.items()
    }
    state = self.restore(step, {'members': abstract})
    return {k: jax.device_get(m['params']) for k, m in state['members'].items()}


def check_metadata(
  have: dict[str, Any],
  want: dict[str, Any],
  where: str,
  allowed: Iterable[str] = (),
) -> list[str]:
  """Refuses to mix two runs in one workdir.

  Args:
    have: metadata of the checkpoint to go on from.
    want: of the run that wants to.
    where: the workdir.
    allowed: fields of the config that may differ, and 'store'.

  Returns:
    the differences that were allowed.

  Raises:
    UserError: names the first field of the config, or the store, that differs.
  """
  here = want['identity'] | {'store': want['store']}
  there = have['identity'] | {'store': have['store']}
  # The whole config may be named, though parts are free.
  names = set().union(*map(_names, (here, there, want['config'])))
  for field in allowed:
    checks.known_field(field, names)
  found = []
  for line in differences(there, here):
    field = line.split(' ', 1)[0]
    if checks.is_fixed(field):
      raise UserError(
        f'--workdir: {where} holds checkpoints of another config ({line}), and '
        'this field cannot change within a run; give another folder'
      )
    if any(f'{field}.'.startswith(f'{name}.') for name in allowed):
      for name, about in have['stopped'].items():
        if f'{field}.'.startswith(f'saes.{name}.'):
          raise UserError(
            f'saes: member {name!r} was stopped at step {about["step"]} and does '
            'not go on; leave it as it was, and start it in another --workdir'
          )
      found.append(line)
      continue
    what = 'store' if field == 'store' else 'config'
    raise UserError(
      f'--workdir: {where} holds checkpoints of another {what} ({line}); give '
      f'another folder, or the same {what}, or --allow-config-change={field}'
    )
  return found


def _names(tree: dict[str, Any], prefix: str = '') -> set[str]:
  names = set()
  for key, value in tree.items():
    names.add(f'{prefix}{key}')
    if isinstance(value, dict):
      names |= _names(value, f'{prefix}{key}.')
  return names
