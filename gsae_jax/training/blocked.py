"""The exact gradient of all features, some of them at a time.

What autodiff of the whole would write to memory and read again, `[B, F]` arrays of
codes and cotangents, stays in a CPU's cache; only what lies in front of the biases
is kept from the forward pass to the gradients. And no product sums over the first
axis of its first factor, which on CPUs takes twice as long: codes have rows first
where they are decoded, and features first where weights get their gradients.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gsae_jax.sae.layers import product
from gsae_jax.sae.tiles import ROWS
from gsae_jax.training import features
from gsae_jax.training.features import All, Batch, Carry, Forward, Walk


def forward(module: nn.Module, params, centred_BD) -> Forward:
  """Encodes and decodes block by block; keeps `z` of each, features first."""
  (encoder,) = module.encoders
  F, D = params['W_dec'].shape
  B, T = len(centred_BD), features.block_size(F)
  names = (encoder, 'W_dec', *module.vectors)
  blocks = _split({k: params[k] for k in names}, F // T)

  def body(state, block):
    decoded, penalised = state
    z_BT = product(centred_BD, block[encoder], module.precision, turned=True)
    vectors = {k: block[k][None] for k in module.vectors}
    codes = module.codes(z_BT, vectors)
    open_iTT = features.is_open(codes).reshape(B // ROWS, ROWS, T)
    both = jnp.concatenate(codes)
    decoded += product(both, block['W_dec'], module.precision)
    return (
      (decoded, penalised + jnp.sum(codes[-1])),
      (z_BT.T, jnp.any(open_iTT, 1)),
    )

  count = len(module.codes(jnp.zeros(()), dict.fromkeys(module.vectors, 0.0)))
  start = jnp.zeros((count * B, D)), jnp.zeros(())
  (decoded, penalised), (z_nTB, unions) = jax.lax.scan(body, start, blocks)
  return Forward(jnp.split(decoded, count), penalised, unions, z_nTB)


def backward(batch: Batch, carry: Carry, found: Forward) -> Walk:
  """Through all features, block by block."""
  module, x_BD, back = batch.module, batch.x_BD, batch.back
  # Turned once, and not by every product.
  both_DB = jax.lax.optimization_barrier(jnp.concatenate(back).T)

  # Blocks have the arrays `[T, ...]` of a walk, and what goes on has the rest.
  def body(rest, block):
    z_TB, params, others, fired_T = block
    sums, pulled_D, norm_error = rest
    carry = Carry(params, others, sums)
    walk = Walk(carry, pulled_D, fired_T, norm_error)
    own = features.read(module, carry, All())
    both_TB = product(own['W_dec'], both_DB, module.precision)
    seen = jnp.split(both_TB, len(back), 1)
    grads = features.gradients(batch, z_TB, None, x_BD, back[0], seen, own)
    walk = features.step_on(walk, All(), batch, own, grads)
    (params, others, sums), pulled_D, fired_T, norm_error = walk
    return (sums, pulled_D, norm_error), (params, others, fired_T)

  _, pulled_D, fired_F, norm_error = features.start(carry)
  blocks = _split((carry.params, carry.others, fired_F), len(found.kept))
  (sums, pulled_D, norm_error), blocks = jax.lax.scan(
    body, (carry.sums, pulled_D, norm_error), (found.kept, *blocks)
  )
  params, others, fired_F = jax.tree.map(
    lambda a: a.reshape(-1, *a.shape[2:]), blocks
  )
  return Walk(Carry(params, others, sums), pulled_D, fired_F, norm_error)


def _split(tree: Any, parts: int) -> Any:
  """Arrays `[F, ...]` as `[parts, F / parts, ...]`."""
  return jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), tree)
