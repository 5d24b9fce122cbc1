"""The train loop: several SAEs, the same batches, one checkpoint."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.activations.loader import Loader
from gsae_jax.activations.store import Store
from gsae_jax.activations.stream import Stream
from gsae_jax.config import MemberConfig, TrainConfig
from gsae_jax.errors import Preempted
from gsae_jax.training import checkpoints
from gsae_jax.training import state as state_lib
from gsae_jax.training.members import Member, build_members
from gsae_jax.training.resampling import resample_members
from gsae_jax.training.tracking import Tracker, diverged


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
) -> bool:
  """Trains the members, from the latest checkpoint if there is one.

  Args:
    store: what is known of the activations.
    loader: gives them; every member's site.
    members: the SAEs.
    settings: the run's.
    mesh: 'data' splits rows and 'model' features.
    seed: of the batch order, and of members that have none.
    workdir: checkpoints, metrics.jsonl and TensorBoard files go there.
    metadata: written beside each checkpoint; `identity` and `store` must be
      those of the checkpoints that are there.
    preempted: asked before each step; True saves and returns.

  Returns:
    True when the run is complete, False when it was preempted.
  """
  run = build_members(members, settings, store, mesh, seed)
  key = jax.device_put(
    jax.random.key_data(jax.random.key(seed)), NamedSharding(mesh, P())
  )
  with contextlib.ExitStack() as stack:
    saved = stack.enter_context(
      checkpoints.Checkpoints(workdir, kept=settings.checkpoints_kept)
    )
    done = saved.steps()
    first = done[-1] if done else 0
    if done:
      checkpoints.check_metadata(saved.metadata(first), metadata, workdir)
      key = _restore(saved, first, run, mesh, key)
    metadata = metadata | {'members': _describe(run, store, seed)}
    tracker = stack.enter_context(
      Tracker(
        workdir,
        resumed_at=first,
        writers=settings.writers,
        config=metadata['config'],
      )
    )
    bar = stack.enter_context(
      tqdm.tqdm(
        total=settings.steps,
        initial=first,
        unit='step',
        mininterval=1.0,
        disable=jax.process_index() != 0,
      )
    )

    def save(step):
      tracker.sync()
      if step not in done:
        _check_finite(run, step)
        saved.save(step, _to_checkpoint(run, key), metadata)
        done.append(step)

    batches = loader.batches(NamedSharding(mesh, P('data')), start=first)
    ready = None
    for step in range(first, settings.steps):
      stopping = preempted()
      if stopping or step % settings.checkpoint_every == 0:
        save(step)
      if stopping:
        return False
      try:
        batch = next(batches)
      except Preempted:  # While a stream was filling its buffer.
        save(step)
        return False
      if step in settings.resample_steps:
        entropy = (*jax.device_get(key).tolist(), step)
        for event in resample_members(run, loader, settings, step, entropy):
          tracker.event(event)
      metrics = {}
      with jax.transfer_guard('disallow'):
        for m in run:
          m.state, metrics[m.config.name] = m.step(
            m.state, batch[m.config.site], m.hyper
          )
      jax.block_until_ready(ready)  # One step ahead of the device, no more.
      ready = metrics
      bar.update()
      if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
        tokens = (step + 1) * settings.batch_size
        _show(
          bar, tracker.write(step + 1, tokens, metrics), settings.batch_size
        )
    save(settings.steps)
  return True


def _show(bar: tqdm.tqdm, values: dict, batch_size: int) -> None:
  if values:
    so_far = bar.format_dict
    rate = (so_far['n'] - so_far['initial']) / max(so_far['elapsed'], 1e-9)
    mean = lambda k: np.mean([v[k] for v in values.values()])
    bar.set_postfix_str(
      f'{rate * batch_size:,.0f} tokens/s, mean loss {mean("loss"):.4g}, '
      f'mean L0 {mean("l0"):.1f}'
    )


def _check_finite(run: list[Member], step: int) -> None:
  """Raises UserError rather than let a diverged state be saved."""
  for m in run:
    if not jax.device_get(_all_finite(m.state.params)):
      raise diverged(m.config.name, f'not all its weights are finite at {step}')


@jax.jit
def _all_finite(params: dict[str, jax.Array]) -> jax.Array:
  return jnp.all(jnp.array([jnp.all(jnp.isfinite(v)) for v in params.values()]))


def _describe(
  run: list[Member], store: Store, seed: int
) -> list[dict[str, Any]]:
  """What a reader needs to know of each member, as plain data."""
  return [
    dataclasses.asdict(m.config)
    | {
      'seed': seed if m.config.seed is None else m.config.seed,
      'width': m.module.width,
      'scale': float(m.hyper.scale),
      'mean_squared_norm': store.sites[m.config.site].mean_squared_norm,
      'shapes': {k: list(v.shape) for k, v in m.state.params.items()},
    }
    for m in run
  ]


def _to_checkpoint(run: list[Member], key: jax.Array) -> dict:
  members = {
    m.config.name: state_lib.to_checkpoint(m.state, m.hyper.scale) for m in run
  }
  return {'rng': key, 'members': members}


def _restore(
  saved: checkpoints.Checkpoints,
  step: int,
  run: list[Member],
  mesh: Mesh,
  key: jax.Array,
) -> jax.Array:
  """Puts the saved states into the members; returns the run's key."""
  abstract = {
    m.config.name: state_lib.abstract_checkpoint(m.module, mesh) for m in run
  }
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=key.sharding)
  state = saved.restore(step, {'rng': key, 'members': abstract})
  for m in run:
    m.state = state_lib.from_checkpoint(state['members'][m.config.name])
  return state['rng']
