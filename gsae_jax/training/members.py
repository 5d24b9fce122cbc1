"""What a config says of the SAEs of a run, without the arrays."""

import dataclasses

import flax.linen as nn
import numpy as np

from gsae_jax.activations.store import Site
from gsae_jax.config import MemberConfig, TrainConfig
from gsae_jax.sae import make_module
from gsae_jax.training.dense import Recipe
from gsae_jax.training.loss import error_scale
from gsae_jax.training.schedule import Schedule
from gsae_jax.training.step import Hyperparameters


@dataclasses.dataclass(frozen=True)
class Member:
  """One SAE of the run: everything but the arrays that it trains."""

  config: MemberConfig
  module: nn.Module
  hyper: Hyperparameters  # NumPy scalars.
  seed: int
  loss_scale: str

  @property
  def name(self) -> str:
    return self.config.name


def make_member(
  config: MemberConfig, settings: TrainConfig, site: Site, seed: int
) -> Member:
  """What the config says of a member, and the run where it says nothing.

  Args:
    config: the member's.
    settings: the run's.
    site: statistics of its activations.
    seed: the run's.
  """
  module = make_module(
    dataclasses.asdict(config) | {'width': site.width},
    encoder_scale=settings.encoder_scale,
    precision=settings.precision,
    turned=True,
  )
  scale = 1.0
  if settings.normalize == 'mean_squared_norm':
    scale = site.mean_squared_norm**-0.5
  rate = config.learning_rate
  units = config.loss_scale or settings.loss_scale
  hyper = Hyperparameters(
    learning_rate=np.float32(settings.learning_rate if rate is None else rate),
    l1=np.float32(config.l1),
    scale=np.float32(scale),
    error_scale=np.float32(
      error_scale(
        units,
        width=site.width,
        mean_norm=scale * site.mean_norm,
      )
    ),
  )
  own_seed = seed if config.seed is None else config.seed
  return Member(config, module, hyper, own_seed, units)


def make_recipe(settings: TrainConfig) -> Recipe:
  """What all members have in common."""
  return Recipe(
    schedule=Schedule(
      steps=settings.steps,
      warmup_steps=settings.warmup_steps,
      l1_warmup_steps=settings.l1_warmup_steps,
      decay_steps=settings.decay_steps,
      resample_steps=settings.resample_steps,
    ),
    dead_after=settings.dead_after,
    histogram_every=settings.histogram_every,
    clip_norm=settings.clip_norm,
    microbatches=settings.microbatches,
  )
