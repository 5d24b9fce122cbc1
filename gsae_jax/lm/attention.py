"""Causal attention that never holds all scores of a long context."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gsae_jax.lm.products import summed_in_float32

# Queries of a block. A context has at most `_BLOCKS` of them, because each is
# compiled on its own; a larger block goes `_ROWS` queries at a time, in a loop.
_BLOCK, _BLOCKS, _ROWS = 128, 8, 512


def attend(
  q_BLHK: jax.Array,
  k_BLGK: jax.Array,
  v_BLGK: jax.Array,
  *,
  scale: float,
  window: int | None,
  cap: float | None,
) -> jax.Array:
  """Softmax attention; every query sees itself and what came before.

  Queries go block by block, and a block meets only the keys that one of its
  queries may see: half the work of a long context, and of its scores
  `[B, H, L, L]` the rows of 512 queries at a time, at most (XLA on CPUs keeps
  those of all blocks, of a long context an eighth). Sums of weights are divided
  by behind the values, where there is less to divide.

  Args:
    q_BLHK: queries.
    k_BLGK: keys; H is a multiple of G, and G heads are shared in order.
    v_BLGK: values.
    scale: of the scores.
    window: positions that a query sees, its own included; None is all.
    cap: scores are `cap * tanh(score / cap)`; None leaves them.

  Returns:
    `[B, L, H, K]`.
  """
  B, L, H, K = q_BLHK.shape
  G = k_BLGK.shape[2]
  # Heads in front: matrices then lie whole, R queries' heads to a key's.
  q = q_BLHK.reshape(B, L, G, H // G, K).transpose(0, 2, 3, 1, 4)
  k, v = (x.transpose(0, 2, 1, 3) for x in (k_BLGK, v_BLGK))
  size = max(_BLOCK, -(-L // _BLOCKS))
  if size > _ROWS:
    size = -(-size // _ROWS) * _ROWS
  blocks = []
  for start in range(0, L, size):
    stop = min(start + size, L)
    first = 0 if window is None else max(0, start - window + 1)
    met = k[..., first:stop, :], v[..., first:stop, :]
    rows = functools.partial(
      _rows, *met, first=first, scale=scale, window=window, cap=cap
    )
    blocks.append(_in_turn(rows, q[..., start:stop, :], start))
  z = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, 3)
  return z.transpose(0, 3, 1, 2, 4).reshape(B, L, H, K)


def _in_turn(rows: Callable, q: jax.Array, start: int) -> jax.Array:
  """`rows` of the queries of a block, so many at a time as may be held."""
  *front, T, K = q.shape
  if T <= _ROWS:
    return rows(q, start)
  turns = -(-T // _ROWS)
  padding = [(0, 0)] * len(front) + [(0, turns * _ROWS - T), (0, 0)]
  split = jnp.pad(q, padding).reshape(*front, turns, _ROWS, K)
  starts = start + _ROWS * jnp.arange(turns)
  z = jax.lax.map(
    lambda turn: rows(*turn), (jnp.moveaxis(split, -3, 0), starts)
  )
  return jnp.moveaxis(z, 0, -3).reshape(*front, -1, K)[..., :T, :]


def _rows(
  k: jax.Array,
  v: jax.Array,
  q: jax.Array,
  start: int | jax.Array,
  *,
  first: int,
  scale: float,
  window: int | None,
  cap: float | None,
) -> jax.Array:
  """What the queries from `start` on see of the keys from `first` on."""
  scores = scale * summed_in_float32('BGRTK,BGSK->BGRTS', q, k)
  if cap is not None:
    scores = cap * jnp.tanh(scores / cap)
  back = start + jnp.arange(q.shape[-2])[:, None]
  back -= first + jnp.arange(k.shape[-2])[None]
  seen = back >= 0
  if window is not None:
    seen &= back < window
  # Not infinite: rows that fill up a turn may see nothing.
  scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
  weights = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
  z = summed_in_float32('BGRTS,BGSK->BGRTK', weights.astype(v.dtype), v)
  z /= jnp.sum(weights, -1, keepdims=True)
  return z.astype(v.dtype)
