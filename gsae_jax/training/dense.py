"""A step by autodiff over all features, and what every kind of step has."""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from gsae_jax.training.loss import losses
from gsae_jax.training.optimizer import Moments
from gsae_jax.training.schedule import Schedule
from gsae_jax.training.sparse import Sums, open_share
from gsae_jax.training.state import OPTIMIZER, MemberState


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
  error_scale: jax.Array
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


def project_rows(g_FD: jax.Array, W_FD: jax.Array) -> jax.Array:
  """The gradient without its component along each unit row."""
  return g_FD - jnp.sum(g_FD * W_FD, -1, keepdims=True) * W_FD


def unit_rows(W_FD: jax.Array) -> jax.Array:
  """Rows of norm 1: Adam's scaling turns updates out of the tangent plane."""
  return W_FD / jnp.linalg.norm(W_FD, axis=-1, keepdims=True)


def _dense_gradients(module, share, frozen, params, x_BD, inputs: Inputs):
  """Sums, firings and gradients of some rows of a batch."""

  def loss(params):
    loss_B, terms = losses(
      module, frozen | params, x_BD, inputs.l1, inputs.error_scale
    )
    return jnp.sum(loss_B) / len(inputs.x_BD), terms

  grads, terms = jax.grad(loss, has_aux=True)(params)
  f_BF, x_hat_BD = terms['f'], terms['x_hat']
  shares = open_share(terms.get('pi_gate', f_BF) > 0) if share else jnp.ones(())
  sums = Sums(
    *(
      jnp.sum(terms[name])
      for name in ('reconstruction', 'auxiliary', 'sparsity')
    ),
    x_hat_squared=jnp.sum(x_hat_BD**2),
    dot=jnp.sum(x_hat_BD * x_BD),
    open_share=shares * (len(x_BD) / len(inputs.x_BD)),
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


def moved(state: MemberState, grads, inputs: Inputs, *, module, recipe):
  """Parameters and moments behind a step of Adam on whole gradients."""
  if recipe.clip_norm is not None:
    norm = jnp.sqrt(sum(squares(grads).values()))
    factor = jnp.minimum(1.0, recipe.clip_norm / (norm + 1e-12))
    grads = jax.tree.map(lambda g: g * factor, grads)
  if module.unit_rows:
    W_dec = state.params['W_dec']
    grads = grads | {'W_dec': project_rows(grads['W_dec'], W_dec)}
  updates, opt_state = OPTIMIZER.update(grads, state.opt_state)
  updates = jax.tree.map(lambda u: -inputs.learning_rate * u, updates)
  trained = {k: state.params[k] for k in grads}
  params = optax.apply_updates(trained, updates)
  if module.unit_rows:
    params = params | {'W_dec': unit_rows(params['W_dec'])}
  return state.params | params, opt_state


def squares(grads: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return {k: jnp.sum(g * g) for k, g in grads.items()}


def dense_step(
  state: MemberState,
  inputs: Inputs,
  *,
  module: nn.Module,
  recipe: Recipe,
  share: bool,
) -> Found:
  """By autodiff, over all features."""
  frozen = {k: v for k, v in state.params.items() if k in module.frozen}
  params = {k: v for k, v in state.params.items() if k not in frozen}
  gradients = functools.partial(
    _dense_gradients, module, share, frozen, params, inputs=inputs
  )
  sums, fired_F, grads = accumulated(
    gradients, inputs.x_BD, recipe.microbatches
  )
  norm_F = jnp.linalg.norm(state.params['W_dec'], axis=-1)
  behind = moved(state, grads, inputs, module=module, recipe=recipe)
  norm_error = jnp.max(jnp.abs(norm_F - 1))
  return Found(sums, fired_F, norm_error, squares(grads), *behind)
