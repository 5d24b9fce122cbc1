"""Checkpoints: Orbax, plain dictionaries of named arrays, JSON metadata.

    workdir/checkpoints/<step>/state      members/<name>/params/W_dec, ...
    workdir/checkpoints/<step>/metadata   schema, config, store, members

`params` are for raw activations: what `gsae_jax.load` gives is what is there.
"""

import logging
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gsae_jax import paths
from gsae_jax.activations.store import differences
from gsae_jax.errors import UserError

SCHEMA = 1


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(
    self, workdir: str, *, kept: int | None, read_only: bool = False
  ):
    """Opens the folder, and makes it unless `read_only`.

    Args:
      workdir: local folder or gs://.
      kept: how many of the latest to keep; None keeps all.
      read_only: never write; the folder must exist.

    Raises:
      UserError: the place cannot be read or written, or is on s3://.
    """
    self.path = paths.workdir(workdir) / 'checkpoints'
    if read_only and not self.path.exists():
      raise UserError(
        f'--workdir: no checkpoints at {self.path}; run gsae_jax.train first'
      )
    options = ocp.CheckpointManagerOptions(
      max_to_keep=kept, read_only=read_only, create=not read_only
    )
    absl_logger = logging.getLogger('absl')
    level = absl_logger.level
    if read_only:  # Of which Orbax would warn every reader.
      absl_logger.setLevel(logging.ERROR)
    try:
      self._manager = ocp.CheckpointManager(
        self.path, options=options, item_names=('state', 'metadata')
      )
    except OSError as e:
      raise UserError(f'--workdir: cannot write {workdir}: {e.strerror}') from e
    finally:
      absl_logger.setLevel(level)

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self._manager.close()  # Waits for what is being saved.

  def steps(self) -> list[int]:
    """Steps of the finished checkpoints, ascending."""
    self._manager.reload()
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
    """Starts saving; the arrays may be donated as soon as this returns."""
    args = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(metadata)
    )
    self._manager.save(step, args=args, force=True)

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
      reason = next(iter(str(e).splitlines()), '')[:200]
      raise UserError(
        f'--workdir: {self.path}/{step} cannot be read ({type(e).__name__}: '
        f'{reason}); delete that folder to go on from the one before'
      ) from e

  def restore_params(
    self, step: int, members: dict[str, dict[str, list[int]]]
  ) -> dict[str, dict[str, np.ndarray]]:
    """Parameters of some members, on the host, whatever they were saved from.

    Args:
      step: a finished one.
      members: shape of each parameter, by member and name.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
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
  have: dict[str, Any], want: dict[str, Any], where: str
) -> None:
  """Refuses to mix two runs in one workdir.

  Raises:
    UserError: names the first field of the config, or the store, that differs.
  """
  different = differences(have['identity'], want['identity'])
  if different:
    raise UserError(
      f'--workdir: {where} holds checkpoints of another config '
      f'({different[0]}); give another folder, or the same config'
    )
  if have['store'] != want['store']:
    raise UserError(
      f'--workdir: {where} holds checkpoints of another store (content hash '
      f'{have["store"][:12]} there, {want["store"][:12]} here); give another '
      'folder, or the same --store'
    )
