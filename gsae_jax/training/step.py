"""The train step: one pure function of one member's state and one batch."""

import dataclasses
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
    error_scale: squared errors are multiplied by it, see `error_scale`.
  """

  learning_rate: jax.Array
  l1: jax.Array
  scale: jax.Array
  error_scale: jax.Array


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What the step of every member has in common.

  Attributes:
    schedule: of the learning rate and the coefficient.
    dead_after: a feature that was silent for so many steps is dead.
    histogram_every: firings are counted from each multiple of so many steps on.
    clip_norm: gradients of a larger norm are scaled down to it; None is never.
  """

  schedule: Schedule
  dead_after: int
  histogram_every: int
  clip_norm: float | None


def error_scale(loss_scale: str, *, width: int, mean_norm: float) -> float:
  """The factor of squared errors (paper D.1.1).

  Args:
    loss_scale: 'sum', as Eq. 4 and 8 are written; 'mean', over D, the units of
      the paper's tables; or 'mean_over_norm', over D and E||x||, those of its
      baselines on Pythia and Gemma.
    width: D.
    mean_norm: E||x|| of the activations as the loss sees them.
  """
  divisors = {'sum': 1.0, 'mean': width, 'mean_over_norm': width * mean_norm}
  return 1.0 / divisors[loss_scale]


def losses(
  module: nn.Module,
  params: dict[str, jax.Array],
  x_BD: jax.Array,
  l1: jax.Array,
  error_scale: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Eq. 4 or 8 for each row, and everything on the way there.

  Args:
    module: the architecture.
    params: its parameters.
    x_BD: `[B, D]` activations, scaled.
    l1: coefficient of the sparsity term.
    error_scale: of the squared errors.

  Returns:
    `[B]`, and what the module's `terms` returns.
  """
  terms = module.apply({'params': params}, x_BD, method='terms')
  error_B = error_scale * (terms['reconstruction'] + terms['auxiliary'])
  return error_B + l1 * terms['sparsity'], terms


def project_rows(g_FD: jax.Array, W_FD: jax.Array) -> jax.Array:
  """The gradient without its component along each unit row."""
  return g_FD - jnp.sum(g_FD * W_FD, -1, keepdims=True) * W_FD


def _norms(grads: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Norm of the gradient, and of each parameter's."""
  squares = {k: jnp.sum(g * g) for k, g in grads.items()}
  total = {'grad_norm': jnp.sqrt(sum(squares.values()))}
  return total | {f'grad_norm_{k}': jnp.sqrt(s) for k, s in squares.items()}


def train_step(
  state: MemberState,
  x_BD: jax.Array,
  hyper: Hyperparameters,
  *,
  module: nn.Module,
  recipe: Recipe,
) -> tuple[MemberState, dict[str, jax.Array]]:
  """One step of Adam with beta1 = 0 and unit decoder rows (paper D.1.1).

  Args:
    state: the member's.
    x_BD: `[B, D]` raw activations, any float dtype.
    hyper: the member's.
    module: the architecture.
    recipe: the run's.

  Returns:
    the next state, and float32 scalars: `loss`, the three terms as they enter
    it without coefficients, `l0`, `gamma` (Eq. 9, of this batch),
    `alive_fraction`, `decoder_norm_error` (of the state that came in),
    `grad_norm` of all and of each parameter, `learning_rate`, `l1_coefficient`.
  """
  schedule = recipe.schedule
  x_BD = x_BD.astype(jnp.float32) * hyper.scale
  learning_rate = hyper.learning_rate * schedule.learning_rate(state.step)
  l1 = hyper.l1 * schedule.l1(state.step)
  frozen = {k: v for k, v in state.params.items() if k in module.frozen}
  params = {k: v for k, v in state.params.items() if k not in frozen}

  def loss(params):
    loss_B, terms = losses(module, frozen | params, x_BD, l1, hyper.error_scale)
    return jnp.mean(loss_B), terms

  (value, terms), grads = jax.value_and_grad(loss, has_aux=True)(params)
  norms = _norms(grads)
  if recipe.clip_norm is not None:
    factor = jnp.minimum(1.0, recipe.clip_norm / (norms['grad_norm'] + 1e-12))
    grads = jax.tree.map(lambda g: g * factor, grads)
  W_dec = state.params['W_dec']
  if module.unit_rows:
    grads = grads | {'W_dec': project_rows(grads['W_dec'], W_dec)}
  updates, opt_state = OPTIMIZER.update(grads, state.opt_state)
  updates = jax.tree.map(lambda u: -learning_rate * u, updates)
  params = optax.apply_updates(params, updates)
  if module.unit_rows:
    # Adam's scaling turns the update out of the tangent plane again.
    norm_F1 = jnp.linalg.norm(params['W_dec'], axis=-1, keepdims=True)
    params = params | {'W_dec': params['W_dec'] / norm_F1}
  fired_F = jnp.sum(terms['f'] > 0, 0, dtype=jnp.int32)
  silent_F = jnp.where(fired_F > 0, 0, state.steps_since_fired + 1)
  counted_F = jnp.where(
    state.step % recipe.histogram_every == 0, 0, state.fired_counts
  )
  x_hat_BD = terms['x_hat']
  metrics = {
    'loss': value,
    **{
      name: jnp.mean(terms[name])
      for name in ('reconstruction', 'sparsity', 'auxiliary')
    },
    'l0': jnp.sum(fired_F, dtype=jnp.float32) / len(x_BD),
    'gamma': jnp.sum(x_hat_BD**2) / jnp.sum(x_hat_BD * x_BD),
    'alive_fraction': jnp.mean(silent_F < recipe.dead_after, dtype=jnp.float32),
    'decoder_norm_error': jnp.max(jnp.abs(jnp.linalg.norm(W_dec, axis=-1) - 1)),
    **norms,
    'learning_rate': learning_rate,
    'l1_coefficient': l1,
  }
  return state._replace(
    step=state.step + 1,
    params=frozen | params,
    opt_state=opt_state,
    steps_since_fired=silent_F,
    fired_counts=counted_F + fired_F,
  ), metrics


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
