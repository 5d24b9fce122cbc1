"""A step by the gradient of what is open, on a mesh.

Where a batch is on one device, in one part and not clipped, each row of a parameter
is read, moved by Adam and written back as soon as its gradient is there, and the
gradient itself is never kept. Rows of features that are shut in the whole batch are
neither read nor written.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gsae_jax.sae.tiles import put_rows, take
from gsae_jax.training.dense import (
  Found,
  Inputs,
  Recipe,
  accumulated,
  moved,
  project_rows,
  squares,
  unit_rows,
)
from gsae_jax.training.optimizer import (
  Moments,
  direction,
  scales,
  touches_every_row,
)
from gsae_jax.training.sparse import Rows, Sums, sparse_pass
from gsae_jax.training.state import SPECS, MemberState

_INPUTS = Inputs(P('data'), P(), P(), P())


def sparse_step(
  state: MemberState,
  inputs: Inputs,
  *,
  module: nn.Module,
  recipe: Recipe,
  mesh: Mesh,
) -> Found:
  """`dense_step`, but for rounding.

  Args:
    state: the member's, alone.
    inputs: of the step; of each microbatch, every device along 'data' has a
      multiple of `tiles.ROWS` rows.
    module: its `is_exact_on_open_gates`.
    recipe: the run's.
    mesh: 'sae' is 1.
  """
  parts = recipe.microbatches
  if mesh.shape['data'] > 1 or parts > 1 or recipe.clip_norm is not None:
    sums, fired_F, norm_error, grads = sparse_gradients(
      state.params, inputs, module=module, mesh=mesh, parts=parts
    )
    behind = moved(state, grads, inputs, module=module, recipe=recipe)
    return Found(sums, fired_F, norm_error, squares(grads), *behind)
  specs = {k: SPECS.get(k, P()) for k in state.params}
  run = jax.shard_map(
    functools.partial(_moving_rows, module=module),
    mesh=mesh,
    in_specs=(specs, Moments(P(), specs), _INPUTS),
    out_specs=(P(), P('model'), P(), specs, Moments(P(), specs)),
    check_vma=False,
  )
  sums, fired_F, about, params, opt_state = run(
    state.params, state.opt_state, inputs
  )
  return Found(
    sums, fired_F, about['norm_error'], about['squares'], params, opt_state
  )


def sparse_gradients(
  params: dict[str, jax.Array],
  inputs: Inputs,
  *,
  module: nn.Module,
  mesh: Mesh,
  parts: int = 1,
) -> tuple[Sums, jax.Array, jax.Array, dict[str, jax.Array]]:
  """Whole gradients, for what looks at all of them before a parameter moves.

  Args:
    params: as they lie in training.
    inputs: of the step.
    module: its `is_exact_on_open_gates`.
    mesh: 'sae' is 1.
    parts: that rows are taken in, one after the other.

  Returns:
    sums, `fired` and `norm_error` of `Found`, and the gradients.
  """
  specs = {k: SPECS.get(k, P()) for k in params}
  run = jax.shard_map(
    functools.partial(_gradients, module=module, parts=parts),
    mesh=mesh,
    in_specs=(specs, _INPUTS),
    out_specs=(P(), P('model'), P(), specs),
    check_vma=False,
  )
  return run(params, inputs)


def _gradients(params, inputs: Inputs, *, module: nn.Module, parts: int):
  """Those of a device's features."""
  batch_size = len(inputs.x_BD) * jax.lax.psum(1, 'data')
  rows = Rows(
    read=lambda _, ids: _read(module, params, ids),
    write=lambda grads, ids, live, _, found: {
      k: put_rows(g, ids, live, found[k]) for k, g in grads.items()
    },
  )

  def of(x_BD):
    zeros = {k: jnp.zeros_like(v) for k, v in params.items() if k != 'b_dec'}
    sums, about, d_b_dec_D, grads = sparse_pass(
      module, params, x_BD, inputs.l1, inputs.error_scale, rows, zeros,
      jnp.bool_(False), batch_size,
    )  # fmt: skip
    shares = sums.open_share / parts
    sums = sums._replace(open_share=shares)
    return sums, about['fired'], d_b_dec_D, grads

  sums, fired_F, d_b_dec_D, grads = accumulated(of, inputs.x_BD, parts)
  grads = jax.lax.psum(grads, 'data') | {'b_dec': d_b_dec_D}
  norm_F = jnp.linalg.norm(params['W_dec'], axis=-1)
  norm_error = jax.lax.pmax(jnp.max(jnp.abs(norm_F - 1)), 'model')
  return sums, fired_F, norm_error, grads


def _read(module, params, ids) -> dict[str, jax.Array]:
  names = ('W_dec', *module.encoders, *module.vectors)
  return {name: take(params[name], ids) for name in names}


def _moving_rows(params, opt_state: Moments, inputs: Inputs, *, module):
  """Parameters and moments behind the step, of a device's features."""
  count = opt_state.count + 1
  at = scales(count)
  rate = inputs.learning_rate
  params, nu = dict(params), dict(opt_state.nu)
  b_dec_D, nu_D = params.pop('b_dec'), nu.pop('b_dec')

  def write(carry, ids, live, read, grads):
    params, nu, total = carry
    for name, g in grads.items():
      some = live.reshape(-1, *(1,) * (g.ndim - 1))
      g = jnp.where(some, g, 0)
      total = total | {name: total[name] + jnp.sum(g * g)}
      if name == 'W_dec':
        g = project_rows(g, read[name])
      step, nu_rows = direction(g, take(nu[name], ids), at)
      rows = read[name] - rate * step
      if name == 'W_dec':
        rows = unit_rows(rows)
      params = params | {name: put_rows(params[name], ids, live, rows)}
      nu = nu | {name: put_rows(nu[name], ids, live, nu_rows)}
    return params, nu, total

  start = params, nu, dict.fromkeys(params, jnp.zeros(()))
  sums, about, g_D, (new, new_nu, total) = sparse_pass(
    module,
    params | {'b_dec': b_dec_D},
    inputs.x_BD,
    inputs.l1,
    inputs.error_scale,
    Rows(read=lambda carry, ids: _read(module, carry[0], ids), write=write),
    start,
    touches_every_row(opt_state.count),
    len(inputs.x_BD),
  )
  step_D, new_nu['b_dec'] = direction(g_D, nu_D, at)
  new['b_dec'] = b_dec_D - rate * step_D
  total = jax.lax.psum(total, 'model') | {'b_dec': jnp.sum(g_D * g_D)}
  fired_F = about.pop('fired')
  about = about | {'squares': total}
  return sums, fired_F, about, new, Moments(count, new_nu)
