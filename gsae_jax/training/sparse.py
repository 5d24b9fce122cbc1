"""The exact gradient where few gates are open: only the encoder is dense.

Every gradient of Eq. 4 and 8 goes through a code, and is 0 where the code that
the loss penalises is 0: there the gate is shut. So one product of the seven, the
encoder's, runs over all features and rows, and the others over what is open:

1. rows, in tiles of a few: the decoder's rows of all features that are open
   anywhere in the tile are gathered, and what the codes decode to is one small
   product;
2. features that are open anywhere in the batch, in tiles of a few: the rows on
   which any of the tile is open are gathered; cotangents and both weights'
   gradients are four small products.

Nothing is scattered but whole rows, each once, so the sums have one order. Each
tile takes the smallest of some capacities that holds its union, and the largest is
everything (`sae/tiles.py`): what comes out is exact whatever is open.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from gsae_jax.sae.layers import product
from gsae_jax.sae.tiles import (
  ROWS,
  capacities,
  compact,
  decode_tiles,
  take,
  which,
)
from gsae_jax.training import features
from gsae_jax.training.features import Batch, Carry, Forward, Some, Walk

FEATURES = 16  # Of a tile, as `tiles.ROWS`.


def _unions(open_FB: jax.Array) -> jax.Array:
  """Whether a feature is open in a tile of rows, `[F, tiles]`."""
  F, B = open_FB.shape
  # Four at a time: reductions over a short last axis are slow.
  bytes_ = open_FB.astype(jnp.uint8).reshape(F, B // ROWS, ROWS // 4, 4)
  words = jax.lax.bitcast_convert_type(bytes_, jnp.uint32)
  union = functools.reduce(
    jnp.bitwise_or, [words[..., i] for i in range(ROWS // 4)]
  )
  return union != 0


def _encode(
  module: nn.Module, params: dict[str, jax.Array], centred_BD: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """What lies in front of the biases, `[F, B]`, and unions, `[tiles, F]`."""
  (encoder,) = module.encoders
  x_DB = centred_BD.T

  def some(rows):
    z_TB = product(rows[encoder], x_DB, module.precision)
    codes = module.codes(z_TB, features.columns(module, rows))
    return z_TB, _unions(features.is_open(codes))

  F = len(params[encoder])
  size = features.block_size(F)
  rows = {
    k: params[k].reshape(-1, size, *params[k].shape[1:])
    for k in (encoder, *module.vectors)
  }
  z, unions = jax.lax.map(some, rows)
  # A barrier, or every use of it would turn it again.
  unions = jax.lax.optimization_barrier(unions.reshape(F, -1).T)
  return z.reshape(F, -1), unions


def _decode(
  module: nn.Module,
  params: dict[str, jax.Array],
  z_FB: jax.Array,
  unions: jax.Array,
) -> tuple[list[jax.Array], jax.Array]:
  """What each code decodes to, `[B, D]` without bias; the penalised one's sum."""
  F, B = z_FB.shape
  z_FiT = z_FB.reshape(F, -1, ROWS)
  vectors_F1 = features.columns(module, params)

  def codes(i, ids):
    if ids is None:
      z_UT, vectors = z_FiT[:, i], vectors_F1
    else:
      z_UT = take(z_FiT, ids, jnp.full(len(ids), i))
      vectors = {k: take(v, ids) for k, v in vectors_F1.items()}
    return jnp.concatenate([c.T for c in module.codes(z_UT, vectors)])

  decoded, sums = decode_tiles(codes, unions, params['W_dec'], module.precision)
  starts = range(0, decoded.shape[1], ROWS)
  parts = [decoded[:, i : i + ROWS].reshape(B, -1) for i in starts]
  return parts, jnp.sum(sums[:, -ROWS:])


def _on_open_rows(batch: Batch):
  """`gradients` of a tile of features, on the rows that any of them is open on."""
  B, precision = len(batch.x_BD), batch.module.precision
  sizes = capacities(16, B, halves=True)

  def on(z_TU, filled_U, x_UD, back, own):
    seen = [product(own['W_dec'], g_UD.T, precision) for g_UD in back]
    return features.gradients(batch, z_TU, filled_U, x_UD, back[0], seen, own)

  def some(size):
    def branch(z_TB, open_B, own):
      ids = compact(open_B, size)
      filled = jnp.arange(size) < jnp.sum(open_B)
      z_TU = jnp.take(z_TB, ids, axis=1, mode='clip')
      back = [take(g_BD, ids) for g_BD in batch.back]
      x_UD = take(batch.x_BD, ids)
      return on(z_TU, filled, x_UD, back, own)

    return branch

  def all_(z_TB, open_B, own):
    del open_B
    return on(z_TB, None, batch.x_BD, batch.back, own)

  branches = [*map(some, sizes[:-1]), all_]

  def run(z_TB, own):
    codes = batch.module.codes(z_TB, features.columns(batch.module, own))
    open_B = jnp.any(features.is_open(codes), 0)
    size = which(sizes, jnp.sum(open_B))
    return jax.lax.switch(size, branches, z_TB, open_B, own)

  return run


def forward(module: nn.Module, params, centred_BD) -> Forward:
  """Encodes densely, and decodes by tiles of rows."""
  z_FB, unions = _encode(module, params, centred_BD)
  return Forward(*_decode(module, params, z_FB, unions), unions, z_FB)


def backward(
  batch: Batch, carry: Carry, found: Forward, *, every_row: jax.Array
) -> Walk:
  """Through features that are open anywhere in the batch.

  Args:
    batch: see `features.Batch`.
    carry: see `features.Carry`.
    found: of `forward`.
    every_row: also features that are shut are written, with gradients of 0.
  """
  touched_F = jnp.any(found.unions, 0) | every_row
  count = jnp.sum(touched_F, dtype=jnp.int32)
  order = compact(touched_F, len(touched_F) + FEATURES)
  run = _on_open_rows(batch)

  def body(i, walk):
    ids = jax.lax.dynamic_slice_in_dim(order, i * FEATURES, FEATURES)
    at = Some(ids, i * FEATURES + jnp.arange(FEATURES) < count)
    own = features.read(batch.module, walk.carry, at)
    return features.step_on(walk, at, batch, own, run(at.take(found.kept), own))

  tiles = (count + FEATURES - 1) // FEATURES
  return jax.lax.fori_loop(0, tiles, body, features.start(carry))
