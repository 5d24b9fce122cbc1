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
    codes = module.codes(z_BT, block)
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

  def body(walk, block):
    z_TB, params, others, fired_T = block
    carry = Carry(params, others, walk.carry)
    walk = walk._replace(carry=carry, fired_F=fired_T)
    own = features.read(module, carry, All())
    both_TB = product(own['W_dec'], both_DB, module.precision)
    seen = jnp.split(both_TB, len(back), 1)
    grads = features.gradients(batch, z_TB, None, x_BD, back[0], seen, own)
    walk = features.step_on(walk, All(), batch, own, grads)
    carry, fired_T = walk.carry, walk.fired_F
    walk = walk._replace(carry=carry.sums, fired_F=None)
    return walk, (carry.params, carry.others, fired_T)

  walk = features.start(carry)
  blocks = _split((carry.params, carry.others, walk.fired_F), len(found.kept))
  walk = walk._replace(carry=carry.sums, fired_F=None)
  walk, blocks = jax.lax.scan(body, walk, (found.kept, *blocks))
  params, others, fired_F = jax.tree.map(
    lambda a: a.reshape(-1, *a.shape[2:]), blocks
  )
  return walk._replace(carry=Carry(params, others, walk.carry), fired_F=fired_F)


def _split(tree: Any, parts: int) -> Any:
  """Arrays `[F, ...]` as `[parts, F / parts, ...]`."""
  return jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), tree)
