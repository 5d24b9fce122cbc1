"""The train step: one pure function of one member's state and one batch."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gsae_jax.training.dense import Found, Inputs, Recipe, dense_step
from gsae_jax.training.loss import Scalar, losses
from gsae_jax.training.rows import step_by_rows
from gsae_jax.training.state import MemberState


class Hyperparameters(NamedTuple):
  """Float32 scalars; arrays, so that one program serves a sweep.

  Attributes:
    learning_rate: peak of the schedule.
    l1: the coefficient lambda of Eq. 4 and 8.
    scale: activations are multiplied by it before anything else.
    error_scale: squared errors are multiplied by it, see `error_scale`.
  """

  learning_rate: Scalar
  l1: Scalar
  scale: Scalar
  error_scale: Scalar


def train_step(
  state: MemberState,
  x_BD: jax.Array,
  hyper: Hyperparameters,
  *,
  module: nn.Module,
  recipe: Recipe,
  way: str = 'dense',
  mesh: Mesh | None = None,
) -> tuple[MemberState, dict[str, jax.Array]]:
  """One step of Adam with beta1 = 0 and unit decoder rows (paper D.1.1).

  Args:
    state: the member's.
    x_BD: `[B, D]` raw activations, any float dtype.
    hyper: the member's.
    module: the architecture.
    recipe: the run's.
    way: 'dense' takes the gradient of all features by autodiff; 'blocked' of
      some at a time (`blocked.py`), and 'sparse' of those that are open
      (`sparse.py`): the same but for rounding.
    mesh: what the step is divided over; None, of a 'dense' one, is one device.

  Returns:
    the next state, and float32 scalars: `loss`, the three terms as they enter
    it without coefficients, `l0`, `gamma` (Eq. 9, of this batch),
    `alive_fraction`, `decoder_norm_error` (of the state that came in; in a sparse
    step, of the rows that it moves), `grad_norm` of all and of each parameter,
    `learning_rate`, `l1_coefficient`; and unless it is 'dense', `open_share` and
    `sparse_step`, 1 where it is 'sparse'.
  """
  schedule = recipe.schedule
  inputs = Inputs(
    x_BD=x_BD.astype(jnp.float32) * hyper.scale,
    l1=hyper.l1 * schedule.l1(state.step),
    error_scale=hyper.error_scale,
    learning_rate=hyper.learning_rate * schedule.learning_rate(state.step),
  )
  if way == 'dense':
    found = dense_step(state, inputs, module=module, recipe=recipe, mesh=mesh)
  else:
    assert mesh is not None
    found = step_by_rows(
      state, inputs, module=module, recipe=recipe, mesh=mesh, way=way
    )
  after = _next(state, found, recipe)
  metrics = _metrics(after, found, inputs, recipe)
  if way != 'dense':
    metrics['open_share'] = found.sums.open_share
    metrics['sparse_step'] = jnp.float32(way == 'sparse')
  return after, metrics


def _next(state: MemberState, found: Found, recipe: Recipe) -> MemberState:
  silent_F = jnp.where(found.fired > 0, 0, state.steps_since_fired + 1)
  counted_F = jnp.where(
    state.step % recipe.histogram_every == 0, 0, state.fired_counts
  )
  return state._replace(
    step=state.step + 1,
    params=found.params,
    opt_state=found.opt_state,
    steps_since_fired=silent_F,
    fired_counts=counted_F + found.fired,
    open_share=jnp.stack([state.open_share[1], found.sums.open_share]),
  )


def _metrics(
  after: MemberState, found: Found, inputs: Inputs, recipe: Recipe
) -> dict[str, jax.Array]:
  sums, rows = found.sums, len(inputs.x_BD)
  means = {
    name: getattr(sums, name) / rows
    for name in ('reconstruction', 'sparsity', 'auxiliary')
  }
  error = inputs.error_scale * (means['reconstruction'] + means['auxiliary'])
  alive_F = after.steps_since_fired < recipe.dead_after
  return {
    'loss': error + inputs.l1 * means['sparsity'],
    **means,
    'l0': jnp.sum(found.fired, dtype=jnp.float32) / rows,
    'gamma': sums.x_hat_squared / sums.dot,
    'alive_fraction': jnp.mean(alive_F, dtype=jnp.float32),
    'decoder_norm_error': found.norm_error,
    'grad_norm': jnp.sqrt(sum(found.squares.values())),
    **{f'grad_norm_{k}': jnp.sqrt(s) for k, s in found.squares.items()},
    'learning_rate': inputs.learning_rate,
    'l1_coefficient': inputs.l1,
  }


def is_sound(
  state: MemberState,
  x_BD: jax.Array,
  hyper: Hyperparameters,
  *,
  module: nn.Module,
  recipe: Recipe,
) -> jax.Array:
  """Whether a state, and its loss on a batch, are all numbers.

  Weights may be finite, and every loss with them not.

  Args:
    state: the member's.
    x_BD: `[B, D]` raw activations.
    hyper: the member's.
    module: the architecture.
    recipe: the run's.
  """
  x_BD = x_BD.astype(jnp.float32) * hyper.scale
  l1 = hyper.l1 * recipe.schedule.l1(state.step)
  loss_B, _ = losses(module, state.params, x_BD, l1, hyper.error_scale)
  leaves = [loss_B, *jax.tree.leaves((state.params, state.opt_state.nu))]
  return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
