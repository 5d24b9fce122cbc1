"""Adam with beta1 = 0 (paper D.1.1), exact for rows that are left alone.

With beta1 = 0 the first moment is the gradient itself, so none is kept, and a
parameter without gradient does not move: only its second moment decays. Second
moments are therefore kept divided by the decay since the last multiple of
`REBASE` steps, `nu = v / 0.999^(count mod REBASE)`, where a gradient of zero
changes nothing. At multiples of `REBASE` every row is touched, so that the
divisor stays above 0.35.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

DECAY, EPS = 0.999, 1e-8
REBASE = 1024


class Moments(NamedTuple):
  """What is carried.

  Attributes:
    count: int32, steps taken.
    nu: second moments, divided as the file's first lines say.
  """

  count: jax.Array
  nu: dict[str, jax.Array]


class Scales(NamedTuple):
  """Float32 scalars of one step: `nu` is `keep * nu + gain * g^2` after it, and
  the second moment without Adam's bias is `correct * nu`.
  """

  keep: jax.Array
  gain: jax.Array
  correct: jax.Array


def scales(count: jax.Array) -> Scales:
  """Those of the step with which `count` steps are taken."""
  since = count % REBASE
  power = jnp.float32(DECAY) ** since.astype(jnp.float32)
  bias = 1 - jnp.float32(DECAY) ** count.astype(jnp.float32)
  return Scales(
    keep=jnp.where(since == 0, jnp.float32(DECAY) ** REBASE, 1.0),
    gain=(1 - DECAY) / power,
    correct=power / bias,
  )


def touches_every_row(count: jax.Array) -> jax.Array:
  """Whether the step behind `count` steps moves second moments to a new divisor."""
  return (count + 1) % REBASE == 0


def direction(
  g: jax.Array, nu: jax.Array, at: Scales
) -> tuple[jax.Array, jax.Array]:
  """Adam's step at a rate of 1, to be taken off, and the new `nu`."""
  nu = at.keep * nu + at.gain * g * g
  return g / (jnp.sqrt(at.correct * nu) + EPS), nu


def adam() -> optax.GradientTransformation:
  """The same numbers as `optax.adam(-1, b1=0, b2=0.999, eps=1e-8)`, to rounding."""

  def init(params):
    zero = jnp.zeros((), jnp.int32)
    return Moments(zero, jax.tree.map(jnp.zeros_like, params))

  def update(grads, state, params=None):
    del params
    count = state.count + 1
    at = scales(count)
    moved = {k: direction(g, state.nu[k], at) for k, g in grads.items()}
    updates = {k: step for k, (step, _) in moved.items()}
    return updates, Moments(count, {k: nu for k, (_, nu) in moved.items()})

  return optax.GradientTransformation(init, update)
