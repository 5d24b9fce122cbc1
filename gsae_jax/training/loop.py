"""The train loop: several SAEs, the same batches, one checkpoint."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax import density, processes
from gsae_jax.activations.loader import Loader
from gsae_jax.activations.store import Store
from gsae_jax.activations.stream import Stream
from gsae_jax.config import MemberConfig, TrainConfig
from gsae_jax.errors import Preempted, UserError
from gsae_jax.training import checkpoints, optimizer
from gsae_jax.training.groups import Baseline, copier, make_groups
from gsae_jax.training.members import make_recipe
from gsae_jax.training.progress import Progress
from gsae_jax.training.resampling import Resampler
from gsae_jax.training.run import Run
from gsae_jax.training.tracking import Tracker


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a call of `train` ended.

  Attributes:
    finished: False when it was preempted.
    step: the last one that was saved.
    tokens_per_second: of this call.
    values: the last metrics that were logged, by member.
    stopped: members that diverged: `step`, `reason` and `last_checkpoint`.
  """

  finished: bool
  step: int
  tokens_per_second: float
  values: dict[str, dict[str, float]]
  stopped: dict[str, dict[str, Any]]


def train(
  store: Store,
  loader: Loader | Stream,
  members: tuple[MemberConfig, ...],
  settings: TrainConfig,
  *,
  mesh: Mesh,
  seed: int,
  workdir: str,
  metadata: dict[str, Any],
  preempted: Callable[[], bool],
  baseline: Baseline | None = None,
  allowed: tuple[str, ...] = (),
) -> Outcome:
  """Trains the members, from the latest checkpoint if there is one.

  Args:
    store: what is known of the activations.
    loader: gives them; every member's site.
    members: the SAEs.
    settings: the run's.
    mesh: 'sae' splits members, 'data' rows and 'model' features.
    seed: of the batch order, and of members that have none.
    workdir: checkpoints, metrics.jsonl and TensorBoard files go there.
    metadata: written beside each checkpoint; `identity` and `store` must be
      those of the checkpoints that are there.
    preempted: asked before each step; True, on any process, saves and returns.
    baseline: parameters of what a member with `baseline` starts from.
    allowed: fields of the identity that may differ from the checkpoint's.

  Raises:
    UserError: what is in the workdir does not fit, or every member diverged.
  """
  run = Run(make_groups(members, settings, store, mesh, seed), store)
  with contextlib.ExitStack() as stack, processes.leaving_with_the_others():
    saved = stack.enter_context(
      checkpoints.Checkpoints(
        workdir,
        kept=settings.checkpoints_kept,
        keep_every=settings.checkpoints_kept_every,
      )
    )
    done = saved.steps()
    first = done[-1] if done else 0
    if first > settings.steps:
      raise UserError(
        f'train.steps: {workdir} is at step {first} already, and the config '
        f'ends at {settings.steps}'
      )
    changes, version = [], optimizer.VERSION
    if done:
      found = saved.metadata(first)
      version = found.get('optimizer_version', 1)
      changes = checkpoints.check_metadata(found, metadata, workdir, allowed)
      run.restore(saved, first)
    else:
      run.start(baseline)
    with processes.together():  # Only one of them writes.
      tracker = stack.enter_context(
        Tracker(
          workdir,
          resumed_at=first,
          writers=settings.writers,
          config=metadata['config'],
          stopped=run.stopped,
        )
      )
    for change in changes if first < settings.steps else ():
      tracker.event({'step': first, 'member': None, 'config_change': change})
    progress = stack.enter_context(
      Progress(
        first=first, steps=settings.steps, batch_size=settings.batch_size
      )
    )
    if version < optimizer.VERSION and first < settings.steps:
      progress.say(
        f'{workdir} was begun with an earlier form of Adam, whose step sizes '
        'differ by up to 1e-5 of their value; it continues with the exact one'
      )
    loop = _Loop(run, saved, tracker, progress, settings, metadata, done, mesh)
    resample = Resampler(
      run.groups, loader, settings, make_recipe(settings).schedule, mesh
    )
    stopping = processes.Ballot(preempted)
    batches = loader.batches(NamedSharding(mesh, P('data')), start=first)
    for step in range(first, settings.steps):
      try:
        if stopping():
          raise Preempted
        if step % settings.checkpoint_every == 0:
          loop.save(step)
        batch = next(batches)  # A stream may be left while it fills its buffer.
        if step in settings.resample_steps:
          loop.check(step)
          for event in resample(step, run.stopped, stopping):
            tracker.event(event)
      except Preempted:  # Nothing of this step was done.
        loop.save(step)
        return loop.outcome(step, finished=False)
      with jax.transfer_guard('disallow'):
        metrics = run.step(batch)
      loop.stepped(step + 1, batch, metrics, loader.bytes_read)
    loop.save(settings.steps)
    return loop.outcome(settings.steps, finished=True)


class _Loop:
  """What happens around a step: logs, checkpoints, and stopping members."""

  def __init__(
    self,
    run: Run,
    saved: checkpoints.Checkpoints,
    tracker: Tracker,
    progress: Progress,
    settings: TrainConfig,
    metadata: dict[str, Any],
    done: list[int],
    mesh: Mesh,
  ):
    self._run = run
    self._copy = copier(mesh)
    self._saved = saved
    self._tracker = tracker
    self._progress = progress
    self._settings = settings
    self._metadata = metadata
    self._done = done
    self._ready: dict | None = None
    self._batch: dict[str, jax.Array] | None = None
    self._values: dict[str, dict[str, float]] = {}
    for about in run.stopped.values():
      saved.pin(about['last_checkpoint'])

  def stepped(
    self, step: int, batch: dict, metrics: dict, bytes_read: int
  ) -> None:
    """Called behind each step, with how many there were."""
    self._batch = batch
    jax.block_until_ready(self._ready)  # One step ahead of the device, no more.
    self._ready = metrics
    self._progress.update()
    s = self._settings
    if step % s.log_every == 0 or step == s.steps:
      rates = self._progress.rates(bytes_read)
      self._logged(
        self._tracker.write(
          step, step * s.batch_size, self._copy(metrics), rates
        )
      )
      self._progress.show(self._values)
    if step % s.histogram_every == 0 or step == s.steps:
      self._write_densities(step)

  def _logged(self, values: dict[str, dict[str, float]]) -> None:
    """Looks at what was logged, for members that diverged."""
    alive = self._run.alive()
    values = {k: v for k, v in values.items() if k in alive}
    for name, scalars in values.items():
      if not np.isfinite(scalars['loss']):
        self._stop(name, int(scalars['step']), f'its loss is {scalars["loss"]}')
    if values:
      self._values = {k: v for k, v in values.items() if k in self._run.alive()}

  def check(self, step: int) -> None:
    """Stops members whose weights, or loss with them, are not all numbers."""
    self._logged(self._tracker.flush())
    if self._batch is None:  # Nothing was trained since the last checkpoint.
      return
    for group in self._run.groups:
      for name, fine in group.sound(self._batch).items():
        if not fine and name in self._run.alive():
          self._stop(name, step, 'its weights or its loss are not all finite')

  def _stop(self, name: str, step: int, reason: str) -> None:
    last = self._done[-1]
    about = {'step': step, 'reason': reason, 'last_checkpoint': last}
    self._run.stopped[name] = about
    self._values.pop(name, None)
    self._saved.pin(last)
    self._tracker.stop(
      {
        'step': step,
        'tokens': step * self._settings.batch_size,
        'member': name,
        'stopped': reason,
        'last_checkpoint': last,
      }
    )
    self._progress.say(tell_stopped({name: about}))
    if not self._run.alive():
      raise UserError(
        f'saes: {tell_stopped(self._run.stopped)}; no member is left. Lower the '
        'learning_rate and start again in another --workdir'
      )

  def save(self, step: int) -> None:
    """Saves the step, unless that was done; never a state that diverged."""
    self.check(step)
    self._tracker.sync()
    if step in self._done:
      return
    metadata = self._metadata | {
      'members': self._run.describe(),
      'stopped': self._run.stopped,
      'optimizer_version': optimizer.VERSION,
    }
    self._saved.save(step, self._run.checkpoint(), metadata)
    self._done.append(step)

  def _write_densities(self, step: int) -> None:
    every, size = self._settings.histogram_every, self._settings.batch_size
    rows = ((step - 1) % every + 1) * size
    self._logged(self._tracker.flush())
    for group in self._run.groups:
      for name, fired_F in group.fired_counts().items():
        if name in self._run.alive():
          record = {'step': step, 'tokens': step * size, 'member': name}
          self._tracker.histogram(record, density.histogram(fired_F, rows))

  def outcome(self, step: int, *, finished: bool) -> Outcome:
    return Outcome(
      finished=finished,
      step=step,
      tokens_per_second=self._progress.tokens_per_second(),
      values=self._values,
      stopped=self._run.stopped,
    )


def tell_stopped(stopped: dict[str, dict[str, Any]]) -> str:
  """What happened to members that diverged, and what is left of them."""
  return '; '.join(
    f'member {name!r} diverged at step {about["step"]}: {about["reason"]}; its '
    f'last good checkpoint is of step {about["last_checkpoint"]}'
    for name, about in stopped.items()
  )
