"""The exact gradient where few gates are open: only the encoder is dense.

Every gradient of Eq. 4 and 8 goes through a code, and is 0 where the code that
the loss penalises is 0: there the gate is shut. So one product of the seven, the
encoder's, runs over all features and rows, and the others over what is open:

1. rows, in tiles of a few: the decoder's rows of all features that are open
   anywhere in the tile are gathered, and what the codes decode to is one small
   product;
2. features that are open anywhere in the batch, in tiles of a few: the rows on
   which any of the tile is open are gathered; cotangents and both weights'
   gradients are four small products, and go at once to where they are used.

Nothing is scattered but whole rows, each once, so the sums have one order. Each
tile takes the smallest of some capacities that holds its union, and the largest is
everything (`sae/tiles.py`): what comes out is exact whatever is open.

Features come first here: `z_FB`. T is rows or features of a tile, U slots.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gsae_jax.sae.layers import product
from gsae_jax.sae.tiles import (
  ROWS,
  capacities,
  compact,
  decode_tiles,
  put_rows,
  take,
  which,
)

FEATURES = 16  # Of a tile, as `tiles.ROWS`.
_ENCODED = 512  # At a time.


class Sums(NamedTuple):
  """Of the whole batch, the same on every device.

  Attributes:
    reconstruction: squared error.
    auxiliary: the same of the auxiliary reconstruction; 0 without one.
    sparsity: the penalised codes.
    x_hat_squared: `||x_hat||^2`.
    dot: `x_hat . x`.
    open_share: see `open_share`.
  """

  reconstruction: jax.Array
  auxiliary: jax.Array
  sparsity: jax.Array
  x_hat_squared: jax.Array
  dot: jax.Array
  open_share: jax.Array


@dataclasses.dataclass(frozen=True)
class Rows:
  """Where rows of parameters come from, and where their gradients go.

  Attributes:
    read: of a carry and feature ids `[T]`, parameters by name.
    write: of a carry, ids, which of them are `live` (the others are to be left
      alone), what was read, and gradients by name; returns the carry.
  """

  read: Callable[[Any, jax.Array], dict[str, jax.Array]]
  write: Callable[..., Any]


def open_share(open_BF: jax.Array) -> jax.Array:
  """The share of features that is open in a tile of rows, mean over tiles.

  It decides what the sparse step takes. Rows that fill no tile are not looked at.
  """
  B, F = open_BF.shape
  whole = B // ROWS * ROWS
  return jnp.mean(
    jnp.any(open_BF[:whole].reshape(-1, ROWS, F), 1), dtype=jnp.float32
  )


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
  """What lies in front of the biases, `[F, B]`, and unions, `[tiles, F]`.

  Some features at a time: a CPU's product is then 1.2 times as fast, and their
  unions are found in its cache.
  """
  (encoder,) = module.encoders
  x_DB = centred_BD.T

  def some(rows):
    z_FB = product(rows[encoder], x_DB, module.precision)
    vectors = {k: rows[k][:, None] for k in module.vectors}
    # What is not a number counts as open, and is seen in the loss.
    return z_FB, _unions(~(module.codes(z_FB, vectors)[-1] <= 0))

  F = len(params[encoder])
  size = _ENCODED if F % _ENCODED == 0 else F
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
  W_dec_FD: jax.Array,
  vectors_F1: dict[str, jax.Array],
  z_FB: jax.Array,
  unions: jax.Array,
) -> tuple[list[jax.Array], jax.Array]:
  """What each code decodes to, `[B, D]` without bias; the penalised one's sum."""
  F, B = z_FB.shape
  z_FiT = z_FB.reshape(F, -1, ROWS)

  def codes(i, ids):
    if ids is None:
      z_UT, vectors = z_FiT[:, i], vectors_F1
    else:
      z_UT = take(z_FiT, ids, jnp.full(len(ids), i))
      vectors = {k: take(v, ids) for k, v in vectors_F1.items()}
    return jnp.concatenate([c.T for c in module.codes(z_UT, vectors)])

  decoded, sums = decode_tiles(codes, unions, W_dec_FD, module.precision)
  starts = range(0, decoded.shape[1], ROWS)
  parts = [decoded[:, i : i + ROWS].reshape(B, -1) for i in starts]
  return parts, jnp.sum(sums[:, -ROWS:])


def sparse_pass(
  module: nn.Module,
  params: dict[str, jax.Array],
  x_BD: jax.Array,
  l1: jax.Array,
  error_scale: jax.Array,
  rows: Rows,
  carry: Any,
  every_row: jax.Array,
  batch_size: int,
) -> tuple[Sums, dict[str, jax.Array], jax.Array, Any]:
  """Everything of a step, on one device of a mesh ('data', 'model').

  Args:
    module: the architecture.
    params: this device's, as they lie in training.
    x_BD: its rows, scaled.
    l1: coefficient of the sparsity term.
    error_scale: of the squared errors.
    rows: of parameters and gradients.
    carry: handed through `rows`. With several devices along 'data', what is
      written is of this device's rows alone.
    every_row: also features that are shut are written, with gradients of 0.
    batch_size: B of the whole batch.

  Returns:
    sums; `fired`, int32 `[F]`, and `norm_error`, of the decoder's rows that were
    written; the gradient of `b_dec`; the carry.
  """
  (encoder,) = module.encoders
  precision = module.precision
  b_dec_D, (B, D) = params['b_dec'], x_BD.shape
  centred_BD = x_BD - b_dec_D
  z_FB, unions = _encode(module, params, centred_BD)
  vectors_F1 = {k: params[k][:, None] for k in module.vectors}
  decoded, penalised = _decode(
    module, params['W_dec'], vectors_F1, z_FB, unions
  )
  decoded = jax.lax.psum(decoded, 'model')
  errors = [d_BD + b_dec_D - x_BD for d_BD in decoded]
  back_BD = [(2 * error_scale / batch_size) * e_BD for e_BD in errors]
  x_hat_BD = decoded[0] + b_dec_D
  squares = jnp.stack([jnp.sum(e_BD**2) for e_BD in errors])
  over_rows = jax.lax.psum(
    (squares, jnp.sum(x_hat_BD**2), jnp.sum(x_hat_BD * x_BD)), 'data'
  )
  both = ('data', 'model')
  sums = Sums(
    reconstruction=over_rows[0][0],
    auxiliary=jnp.sum(over_rows[0][1:]),
    sparsity=jax.lax.psum(penalised, both),
    x_hat_squared=over_rows[1],
    dot=over_rows[2],
    open_share=jax.lax.pmean(
      jnp.sum(unions, dtype=jnp.int32) / unions.size, both
    ),
  )

  touched_F = jnp.any(unions, 0) | every_row
  count = jnp.sum(touched_F, dtype=jnp.int32)
  F = len(touched_F)
  order = compact(touched_F, F + FEATURES)
  sizes = capacities(16, B, halves=True)

  def gradients(z_TU, filled_U, x_UD, back, read):
    """Of a tile's rows; `filled_U` says which slots are."""

    def of(z, vectors):
      return module.codes(z, {k: v[:, None] for k, v in vectors.items()})

    vectors = {k: read[k] for k in module.vectors}
    codes, pull = jax.vjp(of, z_TU, vectors)
    seen = [product(read['W_dec'], g.T, precision) for g in back]
    seen[-1] += l1 / batch_size
    d_z, d_vectors = pull(
      tuple(jnp.where(filled_U, c, 0).astype(z_TU.dtype) for c in seen)
    )
    f = jnp.where(filled_U, codes[0], 0)
    grads = d_vectors | {
      encoder: product(d_z, x_UD, precision),
      'W_dec': product(f, back[0], precision),
    }
    return grads, jnp.sum(d_z, 1), jnp.sum(f > 0, 1, dtype=jnp.int32)

  def some(size):
    def branch(z_TB, open_B, read):
      ids = compact(open_B, size)
      filled = jnp.arange(size) < jnp.sum(open_B)
      z_TU = jnp.take(z_TB, ids, axis=1, mode='clip')
      back = [take(g_BD, ids) for g_BD in back_BD]
      return gradients(z_TU, filled, take(centred_BD, ids), back, read)

    return branch

  def all_(z_TB, open_B, read):
    filled = jnp.ones_like(open_B)
    return gradients(z_TB, filled, centred_BD, back_BD, read)

  branches = [*(some(size) for size in sizes[:-1]), all_]

  def body(i, state):
    carry, pulled_D, fired_F, norm_error = state
    ids = jax.lax.dynamic_slice_in_dim(order, i * FEATURES, FEATURES)
    live = i * FEATURES + jnp.arange(FEATURES) < count
    read = rows.read(carry, ids)
    z_TB = take(z_FB, ids)
    vectors_T1 = {k: read[k][:, None] for k in module.vectors}
    open_B = jnp.any(~(module.codes(z_TB, vectors_T1)[-1] <= 0), 0)
    size = which(sizes, jnp.sum(open_B))
    grads, d_z_T, fired_T = jax.lax.switch(size, branches, z_TB, open_B, read)
    W_TD = jnp.where(live[:, None], read[encoder], 0)
    pulled_D += product(jnp.where(live, d_z_T, 0), W_TD, 'float32')
    norm_T = jnp.linalg.norm(read['W_dec'], axis=-1)
    worst = jnp.max(jnp.where(live, jnp.abs(norm_T - 1), 0))
    return (
      rows.write(carry, ids, live, read, grads),
      pulled_D,
      put_rows(fired_F, ids, live, fired_T),
      jnp.maximum(norm_error, worst),
    )

  state = carry, jnp.zeros(D), jnp.zeros(F, jnp.int32), jnp.zeros(())
  tiles = (count + FEATURES - 1) // FEATURES
  carry, pulled_D, fired_F, norm_error = jax.lax.fori_loop(
    0, tiles, body, state
  )
  d_b_dec_D = jax.lax.psum(jnp.sum(back_BD[0], 0), 'data')
  d_b_dec_D -= jax.lax.psum(pulled_D, both)
  about = {
    'fired': jax.lax.psum(fired_F, 'data'),
    'norm_error': jax.lax.pmax(norm_error, both),
  }
  return sums, about, d_b_dec_D, carry
