"""Where a run's numbers go: metrics.jsonl always, TensorBoard and wandb on demand."""

import hashlib
import json
import os
import tempfile
from typing import Any

import jax
import numpy as np
from etils import epath

from gsae_jax import paths
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
    folder = paths.workdir(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    if 'tensorboard' in writers:
      self._writers.append(_TensorBoard(folder / 'tensorboard', resumed_at))
    if 'wandb' in writers:
      self._writers.append(_Wandb(folder, config))
    path = folder / 'metrics.jsonl'
    # The event of a step comes behind its checkpoint, and will come again.
    kept = [
      r
      for r in read_metrics(path)
      if r['step'] + ('resampled' in r) <= resumed_at
    ]
    self._file = _Lines(path, kept)

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
      self._file.write(record)

  def sync(self) -> None:
    """Makes what was written so far visible, on object storage too."""
    self.flush()
    if self._file:
      self._file.sync()
    for writer in self._writers:
      writer.sync()

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
        raise diverged(member, f'its loss is {scalars["loss"]} at step {step}')
      if self._file:
        record = {'step': step, 'tokens': tokens, 'member': member, **scalars}
        self._file.write(record)
      for writer in self._writers:
        writer.write(step, {f'{member}/{k}': v for k, v in scalars.items()})
    return values


def diverged(member: str, how: str) -> UserError:
  """The error for a member whose numbers are no longer numbers."""
  return UserError(
    f'saes: member {member!r} diverged: {how}; the checkpoints so far are '
    'good. Lower its learning_rate and start again in another --workdir'
  )


class _Lines:
  """A file of JSON lines. Objects in a bucket cannot grow: `sync` writes them whole."""

  def __init__(self, path: epath.Path, kept: list[dict[str, Any]]):
    self._path = path
    self._lines = [json.dumps(record) + '\n' for record in kept]
    self._stream = None
    paths.write_whole(path, ''.join(self._lines))
    if not paths.is_remote(path):
      self._stream = path.open('a')

  def write(self, record: dict[str, Any]) -> None:
    line = json.dumps(record) + '\n'
    if self._stream:
      self._stream.write(line)
      self._stream.flush()
    else:
      self._lines.append(line)

  def sync(self) -> None:
    if not self._stream:
      paths.write_whole(self._path, ''.join(self._lines))

  def close(self) -> None:
    self.sync()
    if self._stream:
      self._stream.close()


class _TensorBoard:
  """Event files; those for a bucket grow in a local folder and are copied."""

  def __init__(self, folder: epath.Path, resumed_at: int):
    import tensorboardX

    self._folder = folder
    self._local = None
    if paths.is_remote(folder):
      self._local = tempfile.TemporaryDirectory()
      folder = epath.Path(self._local.name)
    # What a killed run wrote past its checkpoint is hidden by what comes.
    self._writer = tensorboardX.SummaryWriter(
      os.fspath(folder), purge_step=resumed_at + 1 if resumed_at else None
    )

  def write(self, step: int, scalars: dict[str, float]) -> None:
    for name, value in scalars.items():
      self._writer.add_scalar(name, value, step)

  def sync(self) -> None:
    self._writer.flush()
    if self._local:
      self._folder.mkdir(parents=True, exist_ok=True)
      for file in epath.Path(self._local.name).iterdir():
        (self._folder / file.name).write_bytes(file.read_bytes())

  def close(self) -> None:
    self.sync()
    self._writer.close()
    if self._local:
      self._local.cleanup()


class _Wandb:
  def __init__(self, folder: epath.Path, config: dict[str, Any]):
    try:
      import wandb
    except ImportError as e:
      raise UserError(
        "train.writers: 'wandb' is not installed; pip install gsae_jax[wandb]"
      ) from e
    # The folder is the run: started again, it goes on in the same one.
    self._run = wandb.init(
      project='gsae_jax',
      name=folder.name,
      id=hashlib.sha256(os.fspath(folder).encode()).hexdigest()[:16],
      resume='allow',
      config=config,
    )

  def write(self, step: int, scalars: dict[str, float]) -> None:
    self._run.log(scalars, step=step)

  def sync(self) -> None:
    """Nothing to do: wandb sends by itself."""

  def close(self) -> None:
    self._run.finish()
