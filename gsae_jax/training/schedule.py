"""Learning rate and L1 coefficient as functions of the step alone."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Multipliers in [0, 1] of a member's learning rate and L1 coefficient.

  Attributes:
    steps: length of the run.
    warmup_steps: the learning rate rises from 0.1x to 1x along a cosine over
      so many steps, at the start and after each resampling (paper D.1.1).
    l1_warmup_steps: the coefficient rises linearly from 0.
    decay_steps: the learning rate falls linearly to 0 over the last so many
      steps; 0 is never, as in the paper.
    resample_steps: steps at which dead features are resampled.
  """

  steps: int
  warmup_steps: int
  l1_warmup_steps: int
  decay_steps: int
  resample_steps: tuple[int, ...]

  def learning_rate(self, step: jax.Array) -> jax.Array:
    events = jnp.array((0, *self.resample_steps))
    since = step - jnp.max(jnp.where(events <= step, events, 0))
    part = jnp.minimum(since / max(self.warmup_steps, 1), 1.0)
    rise = 0.1 + 0.9 * (1 - jnp.cos(jnp.pi * part)) / 2
    rise = rise if self.warmup_steps else jnp.ones(())
    fall = (self.steps - step) / max(self.decay_steps, 1)
    return rise * (jnp.clip(fall, 0.0, 1.0) if self.decay_steps else 1.0)

  def l1(self, step: jax.Array) -> jax.Array:
    return jnp.minimum((step + 1) / max(self.l1_warmup_steps, 1), 1.0)
