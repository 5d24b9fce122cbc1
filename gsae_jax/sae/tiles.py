"""Small dense products in the place of a large sparse one.

Rows are taken in tiles of a few, and of a matrix only what any row of the tile
needs: its union. A union takes the smallest of some compiled capacities that
holds it, the largest of which is everything, so nothing is ever left out.

T is rows of a tile, U slots of a union, R rows of codes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gsae_jax.sae.layers import product

# Of a tile: measured on CPUs, where more of them make larger unions, and fewer
# make products too thin.
ROWS = 8

# The share of features in a union, mean over tiles, below which tiles are faster.
FEW = 3 / 16


def capacities(smallest: int, total: int, *, halves: bool) -> tuple[int, ...]:
  """Sizes of unions that are compiled: powers of 2 times the smallest, then all.

  Args:
    smallest: of them.
    total: all.
    halves: also sizes midway, which take longer to compile.
  """
  sizes = [smallest]
  while 2 * sizes[-1] < total:
    sizes += [sizes[-1] * 3 // 2] * halves + [2 * sizes[-1]]
  return (*(size for size in sizes if size < total), total)


def which(sizes: tuple[int, ...], count: jax.Array) -> jax.Array:
  """The number of the capacity that holds so many."""
  return jnp.sum(jnp.array(sizes[:-1], jnp.int32) < count)


def take(a: jax.Array, *ids: jax.Array) -> jax.Array:
  """`a[ids]`, without checks of what is known to be in bounds."""
  return a.at[ids].get(mode='promise_in_bounds')


def put_rows(a: jax.Array, ids: jax.Array, live: jax.Array, rows) -> jax.Array:
  """`a` with rows replaced, but for those that are not live."""
  ids = jnp.where(live, ids, len(a) + jnp.arange(len(ids)))
  return a.at[ids].set(rows, mode='drop', unique_indices=True)


def compact(mask_N: jax.Array, size: int) -> jax.Array:
  """Indices of the first `size` true entries, ascending, and 0 behind them."""
  slots_N = jnp.cumsum(mask_N, dtype=jnp.int32) - 1
  ids_N = jnp.arange(len(mask_N), dtype=jnp.int32)
  return (
    jnp.zeros(size, jnp.int32)
    .at[jnp.where(mask_N, slots_N, size + ids_N)]
    .set(ids_N, mode='drop', unique_indices=True)
  )


def decode_tiles(
  codes: Callable[[jax.Array, jax.Array | None], jax.Array],
  unions: jax.Array,
  W_FD: jax.Array,
  precision: str,
) -> tuple[jax.Array, jax.Array]:
  """`codes W` of every tile.

  Args:
    codes: of a tile's number and of features `[U]`, or of all for None, the codes
      `[R, U]`; those outside of the tile's union are 0.
    unions: bool `[tiles, F]`.
    W_FD: a row for each feature.
    precision: of the product.

  Returns:
    `[tiles, R, D]`, and the sum of each row of codes, `[tiles, R]`.
  """
  tiles, F = unions.shape
  sizes = capacities(64, F, halves=False)
  counts = jnp.sum(unions, 1, dtype=jnp.int32)

  def of(f_RU, W_UD):
    return product(f_RU, W_UD, precision), jnp.sum(f_RU, 1)

  def some(size):
    def branch(i):
      ids = compact(unions[i], size)
      filled_U = jnp.arange(size) < counts[i]
      # Slots that are not filled are of feature 0, times 0.
      return of(jnp.where(filled_U, codes(i, ids), 0), take(W_FD, ids))

    return branch

  branches = [*map(some, sizes[:-1]), lambda i: of(codes(i, None), W_FD)]
  shapes = jax.eval_shape(branches[-1], jnp.int32(0))

  def body(i, carry):
    found = jax.lax.switch(which(sizes, counts[i]), branches, i)
    return tuple(
      jax.lax.dynamic_update_index_in_dim(a, v, i, 0)
      for a, v in zip(carry, found, strict=True)
    )

  start = tuple(jnp.zeros((tiles, *s.shape), s.dtype) for s in shapes)
  return jax.lax.fori_loop(0, tiles, body, start)


def decode(f_BF: jax.Array, W_FD: jax.Array, precision: str) -> jax.Array:
  """`f W`, by tiles where few features are in use, and whole where many are.

  On one device. The numbers are those of the whole product but for rounding.

  Args:
    f_BF: `[..., F]`.
    W_FD: a row for each feature.
    precision: of the product.

  Returns:
    `[..., D]`.
  """
  F, D = W_FD.shape
  rows_NF = f_BF.reshape(-1, F)
  count = len(rows_NF)
  padded = jnp.pad(rows_NF, ((0, -count % ROWS), (0, 0)))
  f_iTF = padded.reshape(-1, ROWS, F)
  unions = jnp.any(f_iTF != 0, 1)

  def codes(i, ids):
    f_TF = jax.lax.dynamic_index_in_dim(f_iTF, i, keepdims=False)
    return f_TF if ids is None else jnp.take(f_TF, ids, axis=1, mode='clip')

  def by_tiles():
    decoded, _ = decode_tiles(codes, unions, W_FD, precision)
    return decoded.reshape(-1, D)[:count]

  few = jnp.mean(unions, dtype=jnp.float32) < FEW
  whole = lambda: product(rows_NF, W_FD, precision)
  x_ND = jax.lax.cond(few, by_tiles, whole)
  return x_ND.reshape(*f_BF.shape[:-1], D)
