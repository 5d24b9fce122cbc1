"""The train loop: several SAEs, the same batches, one checkpoint."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.activations.loader import Loader
from gsae_jax.activations.store import Store, check_site
from gsae_jax.config import MemberConfig, TrainConfig
from gsae_jax.errors import UserError
from gsae_jax.sae import ARCHITECTURES
from gsae_jax.training import checkpoints, resampling
from gsae_jax.training import state as state_lib
from gsae_jax.training.schedule import Schedule
from gsae_jax.training.step import Hyperparameters, train_step
from gsae_jax.training.tracking import Tracker


@dataclasses.dataclass
class Member:
  """One SAE of the run, with the arrays that it trains."""

  config: MemberConfig
  module: nn.Module
  hyper: Hyperparameters
  state: state_lib.MemberState
  step: Callable[..., Any]  # Compiled; members of equal shape share it.


def build_members(
  members: tuple[MemberConfig, ...],
  settings: TrainConfig,
  store: Store,
  mesh: Mesh,
  seed: int,
) -> list[Member]:
  """Fresh members, their states born on the mesh.

  Raises:
    UserError: the store lacks a site, or the mesh does not divide a size.
  """
  _check_sizes(members, settings, store, mesh)
  replicated = NamedSharding(mesh, P())
  steps = {}
  built = []
  for config in members:
    site = store.sites[config.site]
    module = ARCHITECTURES[config.architecture](
      width=site.width,
      features=config.features,
      encoder_scale=settings.encoder_scale,
    )
    if module not in steps:
      steps[module] = compile_step(module, settings, mesh)
    scale = 1.0
    if settings.normalize == 'mean_squared_norm':
      scale = site.mean_squared_norm**-0.5
    rate = config.learning_rate
    hyper = Hyperparameters(
      learning_rate=np.float32(
        settings.learning_rate if rate is None else rate
      ),
      l1=np.float32(config.l1),
      scale=np.float32(scale),
    )
    own_seed = seed if config.seed is None else config.seed
    built.append(
      Member(
        config=config,
        module=module,
        hyper=jax.device_put(hyper, replicated),
        state=state_lib.init_member(module, mesh, seed=own_seed),
        step=steps[module],
      )
    )
  return built


def _check_sizes(members, settings, store, mesh) -> None:
  data, model = mesh.shape['data'], mesh.shape['model']
  if settings.batch_size % data:
    raise UserError(
      f'train.batch_size: {settings.batch_size} is not divisible by mesh.data, '
      f'{data}'
    )
  for config in members:
    check_site(store, config.site, config.name)
    if config.features % model:
      raise UserError(
        f'saes: member {config.name!r} has {config.features} features, not '
        f'divisible by mesh.model, {model}'
      )


def compile_step(
  module: nn.Module, settings: TrainConfig, mesh: Mesh
) -> Callable[..., Any]:
  """`train_step` under jit: donated, its outputs where its inputs were."""
  schedule = Schedule(
    steps=settings.steps,
    warmup_steps=settings.warmup_steps,
    l1_warmup_steps=settings.l1_warmup_steps,
    decay_steps=settings.decay_steps,
    resample_steps=settings.resample_steps,
  )
  step = functools.partial(
    train_step,
    module=module,
    schedule=schedule,
    loss_scale=settings.loss_scale,
    dead_after=settings.dead_after,
  )
  placed = jax.tree.map(
    lambda a: a.sharding, state_lib.abstract_member(module, mesh)
  )
  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(placed, NamedSharding(mesh, P())),
  )


def train(
  store: Store,
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
    store: where the activations are.
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
  sites = tuple(dict.fromkeys(m.site for m in members))
  loader = Loader(store, sites, batch_size=settings.batch_size, seed=seed)
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
    metadata = metadata | {'members': _describe(run, store)}
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
      if step not in done:
        saved.save(step, _to_checkpoint(run, key), metadata)

    batches = loader.batches(NamedSharding(mesh, P('data')), start=first)
    ready = None
    for step in range(first, settings.steps):
      stopping = preempted()
      if stopping or step % settings.checkpoint_every == 0:
        save(step)
      if stopping:
        return False
      if step in settings.resample_steps:
        entropy = (*jax.device_get(key).tolist(), step)
        for event in resample_members(run, loader, settings, step, entropy):
          tracker.event(event)
      batch = next(batches)
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
    tracker.flush()  # A diverged member must not be saved as finished.
    save(settings.steps)
  return True


def _show(bar: tqdm.tqdm, values: dict, batch_size: int) -> None:
  if values:
    rate = bar.format_dict['rate'] or 0
    mean = lambda k: np.mean([v[k] for v in values.values()])
    bar.set_postfix_str(
      f'{rate * batch_size:,.0f} tokens/s, mean loss {mean("loss"):.4g}, '
      f'mean L0 {mean("l0"):.1f}'
    )


def _describe(run: list[Member], store: Store) -> list[dict[str, Any]]:
  """What a reader needs to know of each member, as plain data."""
  return [
    dataclasses.asdict(m.config)
    | {
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


def resample_members(
  run: list[Member],
  loader: Loader,
  settings: TrainConfig,
  step: int,
  entropy: tuple[int, ...],
) -> list[dict[str, Any]]:
  """Resamples every member's dead features; returns a record of each event.

  The subset that losses are computed on is the batches that come next.
  """
  batches = range(step, step + settings.resample_rows // settings.batch_size)
  losses = jax.jit(resampling.row_losses, static_argnums=0)
  apply = jax.jit(resampling.resample, static_argnames='encoder')
  events = []
  for i, m in enumerate(run):
    dead_F = jax.device_get(m.state.steps_since_fired) >= settings.dead_after
    events.append(
      {
        'step': step,
        'tokens': step * settings.batch_size,
        'member': m.config.name,
        'resampled': int(dead_F.sum()),
      }
    )
    if not dead_F.any():
      continue
    rows = functools.partial(loader.rows_at, site=m.config.site)
    losses_N = np.concatenate(
      [
        losses(m.module, m.state.params, rows(b), m.hyper.scale)
        for b in batches
      ]
    )
    drawn = resampling.draw_rows(
      losses_N, int(dead_F.sum()), entropy=(*entropy, i)
    )
    drawn_FD = np.zeros((m.module.features, m.module.width), np.float32)
    batch_of, row_of = np.divmod(drawn, settings.batch_size)
    found = np.zeros((len(drawn), m.module.width), np.float32)
    for b in np.unique(batch_of):
      here = batch_of == b
      found[here] = rows(int(b) + step)[row_of[here]]
    drawn_FD[dead_F] = found * float(m.hyper.scale)
    placed = jax.tree.map(lambda a: a.sharding, m.state)
    fresh = apply(m.state, dead_F, drawn_FD, encoder=m.module.encoder)
    m.state = jax.device_put(fresh, placed)
  return events
