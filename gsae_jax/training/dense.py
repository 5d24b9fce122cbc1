"""A step by autodiff over all features, and what every kind of step has."""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh

from gsae_jax.training.features import Sums
from gsae_jax.training.loss import Scalar, losses
from gsae_jax.training.optimizer import Moments, row_adam, squares
from gsae_jax.training.schedule import Schedule
from gsae_jax.training.state import SPECS, MemberState


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What the step of every member has in common.

  Attributes:
    schedule: of the learning rate and the coefficient.
    dead_after: a feature that was silent for so many steps is dead.
    histogram_every: firings are counted from each multiple of so many steps on.
    clip_norm: gradients of a larger norm are scaled down to it; None is never.
    microbatches: parts that a batch is taken in, one after the other.
  """

  schedule: Schedule
  dead_after: int
  histogram_every: int
  clip_norm: float | None
  microbatches: int


class Inputs(NamedTuple):
  """What a step takes beside the state: scaled rows, and scalars."""

  x_BD: jax.Array
  l1: jax.Array
  error_scale: Scalar
  learning_rate: jax.Array


class Found(NamedTuple):
  """What one step finds, whichever way.

  Attributes:
    sums: of the whole batch.
    fired: int32 `[F]`, rows that each feature fired on.
    norm_error: the furthest that a decoder row was from norm 1.
    squares: sum of each gradient's squares, by parameter.
    params: behind the step.
    opt_state: behind the step.
  """

  sums: Sums
  fired: jax.Array
  norm_error: jax.Array
  squares: dict[str, jax.Array]
  params: dict[str, jax.Array]
  opt_state: Moments


def _dense_gradients(module, frozen, params, x_BD, inputs: Inputs):
  """Sums, firings and gradients of some rows of a batch."""

  def loss(params):
    loss_B, terms = losses(
      module, frozen | params, x_BD, inputs.l1, inputs.error_scale
    )
    return jnp.sum(loss_B) / len(inputs.x_BD), terms

  grads, terms = jax.grad(loss, has_aux=True)(params)
  f_BF, x_hat_BD = terms['f'], terms['x_hat']
  sums = Sums(
    reconstruction=jnp.sum(terms['reconstruction']),
    auxiliary=jnp.sum(terms['auxiliary']),
    sparsity=jnp.sum(terms['sparsity']),
    x_hat_squared=jnp.sum(x_hat_BD**2),
    dot=jnp.sum(x_hat_BD * x_BD),
    open_share=jnp.float32(len(x_BD) / len(inputs.x_BD)),
  )
  return sums, jnp.sum(f_BF > 0, 0, dtype=jnp.int32), grads


def accumulated(fn, x_BD: jax.Array, parts: int):
  """The sum of `fn` over parts of a batch, one after the other."""
  if parts == 1:
    return fn(x_BD)
  B, D = x_BD.shape
  # Each part has rows of every device.
  x_nBD = x_BD.reshape(B // parts, parts, D).swapaxes(0, 1)
  add = lambda total, x_BD: (jax.tree.map(jnp.add, total, fn(x_BD)), None)
  zeros = jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(fn, x_nBD[0])
  )
  return jax.lax.scan(add, zeros, x_nBD)[0]


def as_they_lie(
  grads: dict[str, jax.Array], mesh: Mesh | None
) -> dict[str, jax.Array]:
  """Gradients in the order of their parameters in memory, on TPUs.

  The compiler likes matrices transposed that are products over rows, and would turn
  parameters and moments to that and back, two fifths of all that it moves. Where they
  are divided has to be said with it, or some are gathered. On other devices such a
  constraint may gather what is divided.

  Args:
    grads: by name.
    mesh: what they are divided over; None is one device.
  """
  matrix = Layout((0, 1))

  def constrained(name, g):
    lie = lambda g: with_layout_constraint(g, matrix)
    if mesh is None:
      return lie(g)
    spec = SPECS[name]
    return jax.shard_map(
      lie, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )(g)

  return jax.lax.platform_dependent(
    grads,
    tpu=lambda grads: {
      k: constrained(k, g) if g.ndim == 2 else g for k, g in grads.items()
    },
    default=lambda grads: grads,
  )


def moved(state: MemberState, grads, inputs: Inputs, *, module, recipe):
  """Parameters and moments behind a step of Adam on whole gradients."""
  unit = ('W_dec',) if module.unit_rows else ()
  trained = {k: state.params[k] for k in grads}
  updates, opt_state = row_adam(unit, recipe.clip_norm).update(
    grads, state.opt_state, trained, learning_rate=inputs.learning_rate
  )
  return state.params | optax.apply_updates(trained, updates), opt_state


def dense_step(
  state: MemberState,
  inputs: Inputs,
  *,
  module: nn.Module,
  recipe: Recipe,
  mesh: Mesh | None,
) -> Found:
  """By autodiff, over all features."""
  frozen = {k: v for k, v in state.params.items() if k in module.frozen}
  params = {k: v for k, v in state.params.items() if k not in frozen}
  gradients = functools.partial(
    _dense_gradients, module, frozen, params, inputs=inputs
  )
  sums, fired_F, grads = accumulated(
    gradients, inputs.x_BD, recipe.microbatches
  )
  grads = as_they_lie(grads, mesh)
  norm_F = jnp.linalg.norm(state.params['W_dec'], axis=-1)
  behind = moved(state, grads, inputs, module=module, recipe=recipe)
  norm_error = jnp.max(jnp.abs(norm_F - 1))
  return Found(sums, fired_F, norm_error, squares(grads), *behind)
