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
everything: what comes out is exact whatever is open.

Features come first here: `z_FB`. n is codes, T rows of a tile, U slots.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gsae_jax.sae.layers import product

# Rows, and features, of a tile: measured on CPUs, where more of them make larger
# unions, and fewer make products too thin.
ROWS, FEATURES = 8, 16


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


def capacities(smallest: int, total: int, *, halves: bool) -> tuple[int, ...]:
  """Sizes of unions that are compiled: powers of 2 times the smallest, then all.

  Args:
    smallest: of them.
    total: all.
    halves: also sizes midway, which take longer to compile.
  """
  sizes = [smallest]
  while 4 * sizes[-1] <= total:
    sizes += [sizes[-1] * 3 // 2] * halves + [2 * sizes[-1]]
  return (*(size for size in sizes if size < total), total)


def open_share(open_BF: jax.Array) -> jax.Array:
  """The share of features that is open in a tile of rows, mean over tiles.

  It decides what the sparse step takes. Rows that fill no tile are not looked at.
  """
  B, F = open_BF.shape
  whole = B // ROWS * ROWS
  return jnp.mean(
    jnp.any(open_BF[:whole].reshape(-1, ROWS, F), 1), dtype=jnp.float32
  )


def take(a: jax.Array, *ids: jax.Array) -> jax.Array:
  """`a[ids]`, without checks of what is known to be in bounds."""
  return a.at[ids].get(mode='promise_in_bounds')


def put_rows(a: jax.Array, ids: jax.Array, live: jax.Array, rows) -> jax.Array:
  """`a` with rows replaced, but for those that are not live."""
  ids = jnp.where(live, ids, len(a))
  return a.at[ids].set(rows, mode='drop', unique_indices=True)


def _compact(mask_N: jax.Array, size: int) -> jax.Array:
  """Indices of the first `size` true entries, ascending, and 0 behind them."""
  slots_N = jnp.cumsum(mask_N, dtype=jnp.int32) - 1
  ids_N = jnp.arange(len(mask_N), dtype=jnp.int32)
  return (
    jnp.zeros(size, jnp.int32)
    .at[jnp.where(mask_N, slots_N, size)]
    .set(ids_N, mode='drop', unique_indices=True)
  )


def _unions(open_FB: jax.Array) -> jax.Array:
  """Whether a feature is open in a tile of rows, `[tiles, F]`."""
  F, B = open_FB.shape
  # Four at a time: reductions over a short last axis are slow.
  bytes_ = open_FB.astype(jnp.uint8).reshape(F, B // ROWS, ROWS // 4, 4)
  words = jax.lax.bitcast_convert_type(bytes_, jnp.uint32)
  union = functools.reduce(
    jnp.bitwise_or, [words[..., i] for i in range(ROWS // 4)]
  )
  # A barrier, or every use of it would make it again.
  return jax.lax.optimization_barrier((union != 0).T)


def _smallest(sizes: tuple[int, ...], count: jax.Array) -> jax.Array:
  """Which of the capacities holds so many."""
  return jnp.sum(jnp.array(sizes[:-1]) < count)


def _decode(
  module: nn.Module,
  W_dec_FD: jax.Array,
  vectors_F1: dict[str, jax.Array],
  z_FB: jax.Array,
  unions: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """What the codes decode to, without bias, `[n, B, D]`; the penalised's sum."""
  F, B = z_FB.shape
  D = W_dec_FD.shape[1]
  z_FiT = z_FB.reshape(F, -1, ROWS)
  n = len(module.codes(*_shapes(module, z_FB)))
  sizes = capacities(64, F, halves=False)

  def of(codes, W_UD):
    f_TnU = jnp.concatenate([c.T for c in codes])
    return product(f_TnU, W_UD, module.precision), jnp.sum(codes[-1])

  def some(size):
    def branch(i, union_F):
      ids = _compact(union_F, size)
      filled = jnp.arange(size) < jnp.sum(union_F)
      z_UT = take(z_FiT, ids, jnp.full(size, i))
      codes = module.codes(
        z_UT, {k: take(v, ids) for k, v in vectors_F1.items()}
      )
      codes = [jnp.where(filled[:, None], c, 0) for c in codes]
      return of(codes, take(W_dec_FD, ids))

    return branch

  def all_(i, union_F):
    del union_F
    return of(module.codes(z_FiT[:, i], vectors_F1), W_dec_FD)

  branches = [*(some(size) for size in sizes[:-1]), all_]
  counts = jnp.sum(unions, 1, dtype=jnp.int32)

  def body(i, carry):
    decoded, total = carry
    which = _smallest(sizes, counts[i])
    y, penalised = jax.lax.switch(which, branches, i, unions[i])
    y = y.reshape(n, 1, ROWS, D)
    return (
      jax.lax.dynamic_update_slice(decoded, y, (0, i, 0, 0)),
      total + penalised,
    )

  start = jnp.zeros((n, B // ROWS, ROWS, D)), jnp.zeros(())
  decoded, total = jax.lax.fori_loop(0, B // ROWS, body, start)
  return decoded.reshape(n, B, D), total


def _shapes(module: nn.Module, z_FB: jax.Array):
  """Of the arguments of `codes`."""
  one = jnp.zeros((1, 1), z_FB.dtype)
  return one, dict.fromkeys(module.vectors, one)


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
  z_FB = product(params[encoder], centred_BD.T, precision)
  vectors_F1 = {k: params[k][:, None] for k in module.vectors}
  # What is not a number counts as open, and is seen in the loss.
  open_FB = ~(module.codes(z_FB, vectors_F1)[-1] <= 0)
  unions = _unions(open_FB)
  decoded, penalised = _decode(
    module, params['W_dec'], vectors_F1, z_FB, unions
  )
  decoded_nBD = jax.lax.psum(decoded, 'model')
  error_nBD = decoded_nBD + b_dec_D - x_BD
  # Apart, or slices of them would be copied for every tile.
  back_BD = tuple((2 * error_scale / batch_size) * e_BD for e_BD in error_nBD)
  x_hat_BD = decoded_nBD[0] + b_dec_D
  squares = jnp.sum(error_nBD**2, (1, 2))
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
  order = _compact(touched_F, F + FEATURES)
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
      ids = _compact(open_B, size)
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
    which = _smallest(sizes, jnp.sum(open_B))
    grads, d_z_T, fired_T = jax.lax.switch(which, branches, z_TB, open_B, read)
    pulled_D += product(jnp.where(live, d_z_T, 0), read[encoder], 'float32')
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
