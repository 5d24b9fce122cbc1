"""The SAEs of a run, with the arrays that they train."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.activations.store import Store, check_site
from gsae_jax.config import MemberConfig, TrainConfig
from gsae_jax.errors import UserError
from gsae_jax.sae import ARCHITECTURES
from gsae_jax.training import state as state_lib
from gsae_jax.training.schedule import Schedule
from gsae_jax.training.step import Hyperparameters, train_step


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
