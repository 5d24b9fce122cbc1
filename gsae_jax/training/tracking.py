"""Where a run's numbers go: metrics.jsonl always, TensorBoard and wandb on demand."""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath

from gsae_jax import paths
from gsae_jax.errors import UserError
from gsae_jax.training.records import read_metrics

# Step, tokens, metrics and rates, as `Tracker.write` takes them.
_Pending = tuple[
  int, int, dict[tuple[str, ...], dict[str, Any]], dict[str, float]
]


class Tracker:
  """Writes scalars one call late, so that a step is never waited for.

  `metrics.jsonl` holds an object a line: `step`, `tokens`, `member` and the
  member's scalars; where `member` is null, they are the machine's. A resumed run
  first drops the lines past its checkpoint, so the file ends as if nothing had
  happened.
  """

  def __init__(
    self,
    workdir: str,
    *,
    resumed_at: int,
    writers: tuple[str, ...],
    config: dict[str, Any],
    stopped: Iterable[str] = (),
  ):
    """Opens the file and the writers; does nothing on processes other than 0.

    Args:
      workdir: where.
      resumed_at: the step of the checkpoint; later lines are dropped.
      writers: 'tensorboard', 'wandb'.
      config: for wandb.
      stopped: members of whom nothing is written.
    """
    self._pending: _Pending | None = None
    self._stopped = set(stopped)
    self._file: _Lines | None = None
    self._writers: list[_TensorBoard | _Wandb] = []
    if jax.process_index():
      return
    folder = paths.workdir(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    if 'tensorboard' in writers:
      self._writers.append(_TensorBoard(folder / 'tensorboard', resumed_at))
    if 'wandb' in writers:
      self._writers.append(_Wandb(folder, config))
    path = folder / 'metrics.jsonl'
    # What comes behind the checkpoint of its step will come again.
    behind = {'resampled', 'config_change'}
    kept = [
      r
      for r in read_metrics(path)
      if r['step'] + bool(behind & r.keys()) <= resumed_at
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

  def write(
    self,
    step: int,
    tokens: int,
    metrics: dict[tuple[str, ...], dict[str, Any]],
    rates: dict[str, float],
  ) -> dict[str, dict[str, float]]:
    """Takes the metrics of a step.

    Args:
      step: how many there were.
      tokens: of all of them.
      metrics: scalar arrays by name, for each group of members; of several, the
        members are in front.
      rates: the machine's.

    Returns:
      what `flush` does, of the call before.
    """
    values = self.flush()
    self._pending = (step, tokens, metrics, rates)
    return values

  def event(self, record: dict[str, Any]) -> None:
    """Writes one line of its own, such as a resampling."""
    if self._file:
      self._file.write(record)

  def stop(self, record: dict[str, Any]) -> None:
    """Writes that a member was stopped, and nothing of it any more."""
    self._stopped.add(record['member'])
    self.event(record)

  def histogram(
    self, record: dict[str, Any], densities: dict[str, Any]
  ) -> None:
    """Writes on what share of rows features fired, see `density.histogram`."""
    self.event(record | {'density': densities})
    for writer in self._writers:
      writer.histogram(
        record['step'], f'{record["member"]}/log10_density', densities
      )

  def sync(self) -> None:
    """Makes what was written so far visible, on object storage too."""
    if self._file:
      self._file.sync()
    for writer in self._writers:
      writer.sync()

  def flush(self) -> dict[str, dict[str, float]]:
    """Writes what is pending.

    Returns:
      it, as floats by member, with its `step`; also of members whose loss is
      not finite, of whom nothing is written.
    """
    if self._pending is None:
      return {}
    step, tokens, metrics, rates = self._pending
    self._pending = None
    values = {}
    for names, scalars in jax.device_get(metrics).items():
      columns = {k: np.atleast_1d(v).tolist() for k, v in scalars.items()}
      for i, name in enumerate(names):
        if name not in self._stopped:
          values[name] = {k: v[i] for k, v in columns.items()}
    for member, scalars in [*values.items(), (None, rates)]:
      if member is None or np.isfinite(scalars['loss']):
        self._write(step, tokens, member, scalars)
    return {k: v | {'step': step} for k, v in values.items()}

  def _write(
    self, step: int, tokens: int, member: str | None, scalars: dict[str, float]
  ) -> None:
    # JSON has no NaN: gamma while nothing fires.
    known = {k: v if np.isfinite(v) else None for k, v in scalars.items()}
    self.event({'step': step, 'tokens': tokens, 'member': member, **known})
    prefix = 'run' if member is None else member
    named = {f'{prefix}/{k}': v for k, v in known.items() if v is not None}
    for writer in self._writers:
      writer.write(step, named)


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


def _import_tensorboard():
  # It imports PyTorch where there is one, for tensors that it is never given:
  # seconds of every start.
  absent = 'torch' not in sys.modules
  if absent:
    # None makes an import of it fail; its type says nothing of that.
    sys.modules['torch'] = None  # type: ignore[assignment]
  try:
    import tensorboardX
  finally:
    if absent:
      del sys.modules['torch']
  return tensorboardX


class _TensorBoard:
  """Event files; those for a bucket grow in a local folder and are copied."""

  def __init__(self, folder: epath.Path, resumed_at: int):
    tensorboardX = _import_tensorboard()
    self._folder = folder
    self._local = None
    if paths.is_remote(folder):
      self._local = tempfile.TemporaryDirectory()
      folder = epath.Path(self._local.name)
    # What a killed run wrote past its checkpoint is hidden by what comes.
    self._writer = tensorboardX.SummaryWriter(
      os.fspath(folder), purge_step=resumed_at + 1
    )

  def write(self, step: int, scalars: dict[str, float]) -> None:
    for name, value in scalars.items():
      self._writer.add_scalar(name, value, step)

  def histogram(self, step: int, name: str, densities: dict[str, Any]) -> None:
    edges = densities['log10_edges']
    counts = np.array(densities['features'])
    middles = (np.array(edges[:-1]) + edges[1:]) / 2
    self._writer.add_histogram_raw(
      name,
      min=edges[0],
      max=edges[-1],
      num=int(counts.sum()),
      sum=float(counts @ middles),
      sum_squares=float(counts @ middles**2),
      bucket_limits=edges[1:],
      bucket_counts=counts.tolist(),
      global_step=step,
    )

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
    self._histogram = wandb.Histogram
    # The folder is the run: started again, it goes on in the same one.
    try:
      self._run = wandb.init(
        project='gsae_jax',
        name=folder.name,
        id=hashlib.sha256(os.fspath(folder).encode()).hexdigest()[:16],
        resume='allow',
        config=config,
        dir=None if paths.is_remote(folder) else os.fspath(folder),
      )
    except wandb.Error as e:
      raise UserError(
        f"train.writers: 'wandb': {e}; run `wandb login`, or set WANDB_MODE=offline"
      ) from e

  def write(self, step: int, scalars: dict[str, float]) -> None:
    self._run.log(scalars, step=step)

  def histogram(self, step: int, name: str, densities: dict[str, Any]) -> None:
    bars = densities['features'], densities['log10_edges']
    self._run.log({name: self._histogram(np_histogram=bars)}, step=step)

  def sync(self) -> None:
    """Nothing to do: wandb sends by itself."""

  def close(self) -> None:
    self._run.finish()
