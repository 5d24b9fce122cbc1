"""Causal attention that never holds all scores of a long context."""

import jax
import jax.numpy as jnp

# Queries of a block. A context has at most `_BLOCKS` of them, because each is
# compiled on its own.
_BLOCK, _BLOCKS = 512, 8


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
  `[B, H, L, L]` at most a block's rows at a time.

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
  q = q_BLHK.reshape(B, L, k_BLGK.shape[2], -1, K)
  size = max(_BLOCK, -(-L // _BLOCKS))
  blocks = []
  for start in range(0, L, size):
    stop = min(start + size, L)
    first = 0 if window is None else max(0, start - window + 1)
    keys = slice(first, stop)
    scores = jnp.einsum(
      'BTGHK,BSGK->BGHTS',
      q[:, start:stop],
      k_BLGK[:, keys],
      preferred_element_type=jnp.float32,
    )
    scores *= scale
    if cap is not None:
      scores = cap * jnp.tanh(scores / cap)
    back = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)
    seen = back >= 0
    if window is not None:
      seen &= back < window
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
    blocks.append(
      jnp.einsum(
        'BGHTS,BSGK->BTGHK', weights.astype(v_BLGK.dtype), v_BLGK[:, keys]
      )
    )
  z = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, 1)
  return z.reshape(B, L, H, K)
