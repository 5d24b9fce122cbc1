"""A step by the gradients of some features at a time, on a mesh.

Where a batch is on one device, in one part and not clipped, each row of a parameter
is read, moved by Adam and written back as soon as its gradient is there, and the
gradient itself is never kept. In a sparse step, rows of features that are shut in
the whole batch are neither read nor written.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gsae_jax.training import blocked, sparse
from gsae_jax.training.dense import Found, Inputs, Recipe, accumulated, moved
from gsae_jax.training.features import (
  Carry,
  Forward,
  Sums,
  Walk,
  there_and_back,
)
from gsae_jax.training.optimizer import (
  Moments,
  direction,
  project_rows,
  scales,
  squares,
  touches_every_row,
  unit_rows,
)
from gsae_jax.training.state import SPECS, MemberState

_INPUTS = Inputs._make((P('data'), P(), P(), P()))


def step_by_rows(
  state: MemberState,
  inputs: Inputs,
  *,
  module: nn.Module,
  recipe: Recipe,
  mesh: Mesh,
  way: str,
) -> Found:
  """`dense_step`, but for rounding.

  Args:
    state: the member's, alone.
    inputs: of the step; of each microbatch, every device along 'data' has a
      multiple of `tiles.ROWS` rows.
    module: its `is_exact_on_open_gates`.
    recipe: the run's.
    mesh: 'sae' is 1.
    way: 'blocked', all features; or 'sparse', those that are open.
  """
  parts = recipe.microbatches
  if mesh.shape['data'] > 1 or parts > 1 or recipe.clip_norm is not None:
    sums, fired_F, norm_error, grads = whole_gradients(
      state.params, inputs, module=module, mesh=mesh, way=way, parts=parts
    )
    behind = moved(state, grads, inputs, module=module, recipe=recipe)
    return Found(sums, fired_F, norm_error, squares(grads), *behind)
  specs = {k: SPECS.get(k, P()) for k in state.params}
  moments = Moments._make((P(), specs))
  run = jax.shard_map(
    functools.partial(_moving_rows, module=module, way=way),
    mesh=mesh,
    in_specs=(specs, moments, _INPUTS),
    out_specs=(P(), P('model'), P(), specs, moments),
    check_vma=False,
  )
  sums, fired_F, about, params, opt_state = run(
    state.params, state.opt_state, inputs
  )
  return Found(
    sums, fired_F, about['norm_error'], about['squares'], params, opt_state
  )


def whole_gradients(
  params: dict[str, jax.Array],
  inputs: Inputs,
  *,
  module: nn.Module,
  mesh: Mesh,
  way: str,
  parts: int = 1,
) -> tuple[Sums, jax.Array, jax.Array, dict[str, jax.Array]]:
  """For what looks at all gradients before a parameter moves.

  Args:
    params: as they lie in training.
    inputs: of the step.
    module: its `is_exact_on_open_gates`.
    mesh: 'sae' is 1.
    way: as of `step_by_rows`.
    parts: that rows are taken in, one after the other.

  Returns:
    sums, `fired` and `norm_error` of `Found`, and the gradients.
  """
  specs = {k: SPECS.get(k, P()) for k in params}
  run = jax.shard_map(
    functools.partial(_gradients, module=module, way=way, parts=parts),
    mesh=mesh,
    in_specs=(specs, _INPUTS),
    out_specs=(P(), P('model'), P(), specs),
    check_vma=False,
  )
  return run(params, inputs)


def _pass(way: str, inputs: Inputs, every_row: jax.Array):
  """`there_and_back`, of all features or of those that are open."""
  passes: dict[str, tuple[Callable[..., Forward], Callable[..., Walk]]] = {
    'blocked': (blocked.forward, blocked.backward),
    'sparse': (
      sparse.forward,
      functools.partial(sparse.backward, every_row=every_row),
    ),
  }
  forward, backward = passes[way]
  return functools.partial(
    there_and_back,
    forward,
    backward,
    l1=inputs.l1,
    error_scale=inputs.error_scale,
  )


def _gradients(
  params, inputs: Inputs, *, module: nn.Module, way: str, parts: int
):
  """Those of a device's features."""
  batch_size = len(inputs.x_BD) * jax.lax.psum(1, 'data')
  own = {k: v for k, v in params.items() if k != 'b_dec'}
  carry = Carry(own, jax.tree.map(jnp.zeros_like, own), {})

  def write(carry, at, _, grads):
    put = {k: at.put(g, grads[k]) for k, g in carry.others.items()}
    return carry._replace(others=put)

  def of(x_BD):
    sums, about, d_b_dec_D, (_, grads, _) = _pass(way, inputs, jnp.bool_(False))(
      carry, x_BD, params['b_dec'],
      module=module, batch_size=batch_size, write=write,
    )  # fmt: skip
    shares = sums.open_share / parts
    sums = sums._replace(open_share=shares)
    return sums, about['fired'], d_b_dec_D, grads

  sums, fired_F, d_b_dec_D, grads = accumulated(of, inputs.x_BD, parts)
  grads = jax.lax.psum(grads, 'data') | {'b_dec': d_b_dec_D}
  norm_F = jnp.linalg.norm(params['W_dec'], axis=-1)
  norm_error = jax.lax.pmax(jnp.max(jnp.abs(norm_F - 1)), 'model')
  return sums, fired_F, norm_error, grads


def _moving_rows(params, opt_state: Moments, inputs: Inputs, *, module, way):
  """Parameters and moments behind the step, of a device's features."""
  count = opt_state.count + 1
  now = scales(count)
  rate = inputs.learning_rate
  params, nu = dict(params), dict(opt_state.nu)
  b_dec_D, nu_D = params.pop('b_dec'), nu.pop('b_dec')

  def write(carry, at, read, grads):
    params, nu, total = carry
    for name, g in grads.items():
      g = at.keep(g)
      total = total | {name: total[name] + jnp.sum(g * g)}
      if name == 'W_dec':
        g = project_rows(g, read[name])
      step, nu_rows = direction(g, at.take(nu[name]), now)
      rows = read[name] - rate * step
      if name == 'W_dec':
        rows = unit_rows(rows)
      params = params | {name: at.put(params[name], rows)}
      nu = nu | {name: at.put(nu[name], nu_rows)}
    return Carry(params, nu, total)

  start = Carry(params, nu, dict.fromkeys(params, jnp.zeros(())))
  run = _pass(way, inputs, touches_every_row(opt_state.count))
  sums, about, g_D, (new, new_nu, total) = run(
    start, inputs.x_BD, b_dec_D,
    module=module, batch_size=len(inputs.x_BD), write=write,
  )  # fmt: skip
  step_D, new_nu['b_dec'] = direction(g_D, nu_D, now)
  new['b_dec'] = b_dec_D - rate * step_D
  total = jax.lax.psum(total, 'model') | {'b_dec': jnp.sum(g_D * g_D)}
  fired_F = about.pop('fired')
  about = about | {'squares': total}
  return sums, fired_F, about, new, Moments(count, new_nu)
