"""Adam with beta1 = 0 (paper D.1.1), exact for rows that are left alone.

With beta1 = 0 the first moment is the gradient itself, so none is kept, and a
parameter without gradient does not move: only its second moment decays. Second
moments are therefore kept divided by the decay since the last multiple of
`REBASE` steps, `nu = v / 0.999^(count mod REBASE)`, where a gradient of zero
changes nothing. At multiples of `REBASE` every row is touched, so that the
divisor stays above 0.35.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

DECAY, EPS = 0.999, 1e-8
REBASE = 1024
# Written to checkpoints. 1: Adam's bias correction was 1 - float32(0.999)**count.
VERSION = 2
# Powers of the decay are exp(n log 0.999), with the logarithm taken in float64:
# float32(0.999)**n is off by 1.3e-8 n, and 1 - float32(0.999)**n by 1.3e-5 at
# n = 1, in last bits that differ between processors. That flipped early gates.
_LOG_DECAY = math.log(DECAY)


class Moments(NamedTuple):
  """What is carried.

  Attributes:
    count: int32, steps taken.
    nu: second moments, divided as the file's first lines say.
  """

  # Optax's name for it, which hides a method of tuples.
  count: jax.Array  # type: ignore[assignment]
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
  power = jnp.exp(since.astype(jnp.float32) * _LOG_DECAY)
  bias = -jnp.expm1(count.astype(jnp.float32) * _LOG_DECAY)
  return Scales(
    keep=jnp.where(since == 0, DECAY**REBASE, 1.0),
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


def project_rows(g_FD: jax.Array, W_FD: jax.Array) -> jax.Array:
  """The gradient without its component along each unit row."""
  return g_FD - jnp.sum(g_FD * W_FD, -1, keepdims=True) * W_FD


def unit_rows(W_FD: jax.Array) -> jax.Array:
  """Rows of norm 1: Adam's scaling turns updates out of the tangent plane."""
  return W_FD / jnp.linalg.norm(W_FD, axis=-1, keepdims=True)


def squares(grads: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return {k: jnp.sum(g * g) for k, g in grads.items()}


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


def row_adam(
  unit: tuple[str, ...], clip_norm: float | None
) -> optax.GradientTransformationExtraArgs:
  """All that lies between gradients and parameters (paper D.1.1).

  `update` wants the parameters, and the rate of the step as `learning_rate`.

  Args:
    unit: parameters whose rows are held at norm 1: the gradient is projected before
      Adam, and rows are divided by their norm behind it.
    clip_norm: gradients of a larger norm, all together, are scaled down to it; None
      is never.
  """
  inner = adam()

  def update(grads, state, params, *, learning_rate):
    if clip_norm is not None:
      norm = jnp.sqrt(sum(squares(grads).values()))
      factor = jnp.minimum(1.0, clip_norm / (norm + 1e-12))
      grads = jax.tree.map(lambda g: g * factor, grads)
    projected = {k: project_rows(grads[k], params[k]) for k in unit}
    steps, state = inner.update(grads | projected, state)
    updates = jax.tree.map(lambda u: -learning_rate * u, steps)
    back = {k: unit_rows(params[k] + updates[k]) - params[k] for k in unit}
    return updates | back, state

  return optax.GradientTransformationExtraArgs(inner.init, update)
