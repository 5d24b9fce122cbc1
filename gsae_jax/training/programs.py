"""The programs of members of one shape: which there are, compiled."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.config import TrainConfig
from gsae_jax.errors import UserError
from gsae_jax.sae.tiles import ROWS
from gsae_jax.training import state as state_lib
from gsae_jax.training.dense import Recipe
from gsae_jax.training.step import is_sound, train_step

# D * F * B below which several SAEs at once should keep a device busier: an
# estimate from what launching kernels takes on an H200, not a measurement.
_WORTH_STACKING = 1e11

# D * F * B, of a device, from which programs other than autodiff's are worth the
# seconds that they take to compile.
_WORTH_BLOCKS = 2**28


def is_stacked(settings: TrainConfig, module: nn.Module, mesh: Mesh) -> bool:
  """Whether members of this shape are trained as a stack.

  On CPU that loses, to its caches; on an accelerator it gains as long as one
  member does not keep it busy.
  """
  if settings.members != 'auto':
    return settings.members == 'stacked'
  if mesh.shape['sae'] > 1:
    return True
  work = module.width * module.features * settings.batch_size
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  return not on_cpu and work < _WORTH_STACKING


def ways(
  settings: TrainConfig, module: nn.Module, mesh: Mesh, *, stacked: bool
) -> tuple[str, ...]:
  """Those of `train_step` that members of this shape may take.

  On CPUs, SAEs of some size go by blocks, and by open gates where rows move one by
  one: that was measured.

  Raises:
    UserError: train.sparse is 'always', and it cannot be.
  """
  rows = settings.batch_size // settings.microbatches
  fits = rows % (ROWS * mesh.shape['data']) == 0
  moves_rows = (
    mesh.shape['data'] == settings.microbatches == 1
    and settings.clip_norm is None
  )
  can = module.is_exact_on_open_gates and not stacked and fits
  if settings.sparse == 'always':
    if not can:
      raise UserError(
        "train.sparse: 'always' is for members of architecture 'gated' or 'relu', "
        'not stacked, without an untied encoder and variants of the loss, and for '
        f'batches of a multiple of {ROWS} rows for every device along mesh.data '
        "and microbatch; set it to 'auto'"
      )
    return ('sparse',)
  work = module.width * module.features * rows
  work /= mesh.shape['model'] * mesh.shape['data']
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  if not (can and on_cpu and work >= _WORTH_BLOCKS):
    return ('dense',)
  if settings.sparse == 'auto' and moves_rows:
    return ('blocked', 'sparse')
  return ('blocked',)


def _of_members(fn: Callable[..., Any], mesh: Mesh, stacked: bool):
  """`fn(state, x_BD, hyper)` of a member alone, or of each of a stack.

  Returns:
    a function of state, a tuple of batches `[B, D]` and hyperparameters. Of a
    stack, each has the members in front, and `which` says whose batch is which;
    None is that all have the first.
  """

  def program(state, x, hyper, *, which):
    if not stacked:
      return fn(state, x[0], hyper)
    if which is None:
      each = jax.vmap(fn, in_axes=(0, None, 0), spmd_axis_name='sae')
      return each(state, x[0], hyper)
    spread = NamedSharding(mesh, P('sae', 'data', None))
    x_SBD = jnp.stack([x[i] for i in which])
    x_SBD = jax.lax.with_sharding_constraint(x_SBD, spread)
    return jax.vmap(fn, spmd_axis_name='sae')(state, x_SBD, hyper)

  return program


def compile_step(
  module: nn.Module,
  recipe: Recipe,
  mesh: Mesh,
  *,
  stacked: bool,
  way: str = 'dense',
) -> jax.stages.Wrapped:
  """`train_step` under jit: donated, its outputs where its inputs were."""
  step = functools.partial(
    train_step, module=module, recipe=recipe, way=way, mesh=mesh
  )
  placed = state_lib.shardings(
    mesh,
    state_lib.member_shapes(module),
    layout='stacked' if stacked else 'alone',
  )
  return jax.jit(
    _of_members(step, mesh, stacked),
    donate_argnums=0,
    static_argnames='which',
    # Metrics stay where they were made: few are ever looked at.
    out_shardings=(placed, NamedSharding(mesh, P('sae') if stacked else P())),
  )


def compile_check(
  module: nn.Module, recipe: Recipe, mesh: Mesh, *, stacked: bool
) -> Callable[..., Any]:
  """`is_sound` under jit."""
  check = functools.partial(is_sound, module=module, recipe=recipe)
  return jax.jit(_of_members(check, mesh, stacked), static_argnames='which')
