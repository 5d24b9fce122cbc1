"""The train step: one pure function of one member's state and one batch."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from gsae_jax.training.schedule import Schedule
from gsae_jax.training.state import OPTIMIZER, MemberState


class Hyperparameters(NamedTuple):
  """Float32 scalars; arrays, so that one program serves a sweep.

  Attributes:
    learning_rate: peak of the schedule.
    l1: the coefficient lambda of Eq. 4 and 8.
    scale: activations are multiplied by it before anything else.
  """

  learning_rate: jax.Array
  l1: jax.Array
  scale: jax.Array


def total_loss(
  module: nn.Module,
  params: dict[str, jax.Array],
  x_BD: jax.Array,
  l1: jax.Array,
  loss_scale: str,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Eq. 4 or 8, and its terms.

  Args:
    module: the architecture.
    params: its parameters.
    x_BD: `[B, D]` activations, scaled.
    l1: coefficient of the sparsity term.
    loss_scale: 'sum', or 'mean': squared errors are divided by D, the units of
      the paper's tables (D.1.1).
  """
  terms = module.apply({'params': params}, x_BD, method='losses')
  error = terms['reconstruction'] + terms['auxiliary']
  if loss_scale == 'mean':
    error /= module.width
  return error + l1 * terms['sparsity'], terms


def project_rows(g_FD: jax.Array, W_FD: jax.Array) -> jax.Array:
  """The gradient without its component along each unit row."""
  return g_FD - jnp.sum(g_FD * W_FD, -1, keepdims=True) * W_FD


def train_step(
  state: MemberState,
  x_BD: jax.Array,
  hyper: Hyperparameters,
  *,
  module: nn.Module,
  schedule: Schedule,
  loss_scale: str,
  dead_after: int,
) -> tuple[MemberState, dict[str, jax.Array]]:
  """One step of Adam with beta1 = 0 and unit decoder rows (paper D.1.1).

  Args:
    state: the member's.
    x_BD: `[B, D]` raw activations, any float dtype.
    hyper: the member's.
    module: the architecture.
    schedule: the run's.
    loss_scale: see `total_loss`.
    dead_after: a feature that was silent for so many steps is dead.

  Returns:
    the next state, and float32 scalars: `loss`, the three terms as they enter
    it without coefficients, `l0`, `dead_fraction`, `learning_rate`,
    `l1_coefficient`.
  """
  x_BD = x_BD.astype(jnp.float32) * hyper.scale
  learning_rate = hyper.learning_rate * schedule.learning_rate(state.step)
  l1 = hyper.l1 * schedule.l1(state.step)
  loss = lambda params: total_loss(module, params, x_BD, l1, loss_scale)
  (value, terms), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
  W_dec = state.params['W_dec']
  grads = grads | {'W_dec': project_rows(grads['W_dec'], W_dec)}
  updates, opt_state = OPTIMIZER.update(grads, state.opt_state)
  updates = jax.tree.map(lambda u: -learning_rate * u, updates)
  params = optax.apply_updates(state.params, updates)
  # Adam's scaling turns the update out of the tangent plane again.
  norm_F1 = jnp.linalg.norm(params['W_dec'], axis=-1, keepdims=True)
  params = params | {'W_dec': params['W_dec'] / norm_F1}
  fired_BF = terms.pop('f') > 0
  silent_F = jnp.where(jnp.any(fired_BF, 0), 0, state.steps_since_fired + 1)
  metrics = {
    'loss': value,
    **terms,
    'l0': jnp.mean(jnp.sum(fired_BF, -1, dtype=jnp.float32)),
    'dead_fraction': jnp.mean(silent_F >= dead_after, dtype=jnp.float32),
    'learning_rate': learning_rate,
    'l1_coefficient': l1,
  }
  return MemberState(
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    steps_since_fired=silent_F,
  ), metrics
