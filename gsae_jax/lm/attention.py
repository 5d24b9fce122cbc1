"""Causal attention that never holds all scores of a long context."""

import jax
import jax.numpy as jnp

# Queries of a block. A context has at most `_BLOCKS` of them, because each is
# compiled on its own.
_BLOCK, _BLOCKS = 128, 8


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
  `[B, H, L, L]` at most a block's rows at a time. Sums of weights are divided by
  behind the values, where there is less to divide.

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
  blocks = []
  for start in range(0, L, size):
    stop = min(start + size, L)
    first = 0 if window is None else max(0, start - window + 1)
    scores = scale * jnp.einsum(
      'BGRTK,BGSK->BGRTS',
      q[..., start:stop, :],
      k[..., first:stop, :],
      preferred_element_type=jnp.float32,
    )
    if cap is not None:
      scores = cap * jnp.tanh(scores / cap)
    back = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)
    seen = back >= 0
    if window is not None:
      seen &= back < window
    scores = jnp.where(seen, scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
    z = jnp.einsum(
      'BGRTS,BGSK->BGRTK',
      weights.astype(v.dtype),
      v[..., first:stop, :],
      preferred_element_type=jnp.float32,
    )
    z /= jnp.sum(weights, -1, keepdims=True)
    blocks.append(z.astype(v.dtype))
  z = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, 3)
  return z.transpose(0, 3, 1, 2, 4).reshape(B, L, H, K)
