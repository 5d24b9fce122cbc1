"""Where a run's numbers go: metrics.jsonl always, TensorBoard and wandb on demand."""

import json
import os
from typing import Any

import jax
import numpy as np
from etils import epath

from gsae_jax.errors import UserError
from gsae_jax.training.records import read_metrics


class Tracker:
  """Writes scalars one call late, so that a step is never waited for.

  `metrics.jsonl` holds an object a line: `step`, `tokens`, `member` and the
  member's scalars. A resumed run first drops the lines past its checkpoint, so
  the file ends as if nothing had happened.
  """

  def __init__(
    self,
    workdir: str,
    *,
    resumed_at: int,
    writers: tuple[str, ...],
    config: dict[str, Any],
  ):
    """Opens the file and the writers; does nothing on processes other than 0."""
    self._pending = None
    self._file = None
    self._writers = []
    if jax.process_index():
      return
    folder = epath.Path(workdir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if 'tensorboard' in writers:
      self._writers.append(_TensorBoard(os.fspath(folder / 'tensorboard')))
    if 'wandb' in writers:
      self._writers.append(_Wandb(folder.name, config))
    path = folder / 'metrics.jsonl'
    # The event of a step comes behind its checkpoint, and will come again.
    kept = [
      r
      for r in read_metrics(path)
      if r['step'] + ('resampled' in r) <= resumed_at
    ]
    part = folder / 'metrics.jsonl.part'
    part.write_text(''.join(json.dumps(r) + '\n' for r in kept))
    part.replace(path)
    self._file = path.open('a')

  def __enter__(self):
    return self

  def __exit__(self, error, *unused):
    try:
      if error is None:
        self.flush()
    finally:
      for writer in self._writers:
        writer.close()
      if self._file:
        self._file.close()

  def write(self, step: int, tokens: int, metrics: dict[str, Any]) -> dict:
    """Takes `{member: {name: scalar array}}`; returns the last call's values."""
    values = self.flush()
    self._pending = (step, tokens, metrics)
    return values

  def event(self, record: dict[str, Any]) -> None:
    """Writes one line of its own, such as a resampling."""
    self.flush()
    if self._file:
      self._file.write(json.dumps(record) + '\n')
      self._file.flush()

  def flush(self) -> dict[str, dict[str, float]]:
    """Writes what is pending, and returns it as floats.

    Raises:
      UserError: a member's loss is not finite.
    """
    if self._pending is None:
      return {}
    step, tokens, metrics = self._pending
    self._pending = None
    values = {
      member: {k: float(v) for k, v in scalars.items()}
      for member, scalars in jax.device_get(metrics).items()
    }
    for member, scalars in values.items():
      if not np.isfinite(scalars['loss']):
        raise UserError(
          f'saes: member {member!r} diverged: its loss is {scalars["loss"]} at '
          f'step {step}; lower its learning rate. The last checkpoint is good'
        )
      if self._file:
        record = {'step': step, 'tokens': tokens, 'member': member, **scalars}
        self._file.write(json.dumps(record) + '\n')
      for writer in self._writers:
        writer.write(step, {f'{member}/{k}': v for k, v in scalars.items()})
    if self._file:
      self._file.flush()
    return values


class _TensorBoard:
  def __init__(self, folder: str):
    import tensorboardX

    self._writer = tensorboardX.SummaryWriter(folder)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    for name, value in scalars.items():
      self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    self._writer.close()


class _Wandb:
  def __init__(self, name: str, config: dict[str, Any]):
    try:
      import wandb
    except ImportError as e:
      raise UserError(
        "train.writers: 'wandb' is not installed; pip install gsae_jax[wandb]"
      ) from e
    # The folder's name is the run's: started again, it goes on in the same.
    self._run = wandb.init(
      project='gsae_jax', name=name, id=name, resume='allow', config=config
    )

  def write(self, step: int, scalars: dict[str, float]) -> None:
    self._run.log(scalars, step=step)

  def close(self) -> None:
    self._run.finish()
