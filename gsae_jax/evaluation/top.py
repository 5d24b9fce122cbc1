"""The contexts on which each feature is strongest: a bounded heap on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Top(NamedTuple):
  """K contexts of every feature, the strongest first, each context once.

  Attributes:
    activations_FK: the largest in each; 0 where there are fewer than K.
    contexts_FK: which context; -1 where there is none.
    positions_FK: where in it.
  """

  activations_FK: jax.Array | np.ndarray
  contexts_FK: jax.Array | np.ndarray
  positions_FK: jax.Array | np.ndarray


def empty_top(features: int, k: int) -> Top:
  """Before the first context, on the host."""
  shape = features, k
  none = np.full(shape, -1, np.int32)
  return Top(np.zeros(shape, np.float32), none, none)


def update(top: Top, contexts_B: jax.Array, f_BLF: jax.Array) -> Top:
  """Goes on with contexts whose numbers are above those before.

  Args:
    top: so far.
    contexts_B: their numbers, ascending.
    f_BLF: features, 0 outside the mask.
  """
  strongest_FB = jnp.max(f_BLF, 1).T
  positions_FB = jnp.argmax(f_BLF, 1).T.astype(jnp.int32)
  contexts_FB = jnp.where(strongest_FB > 0, contexts_B, -1).astype(jnp.int32)
  positions_FB = jnp.where(strongest_FB > 0, positions_FB, -1)
  joined = map(
    lambda *pair: jnp.concatenate(pair, 1),
    top,
    (strongest_FB, contexts_FB, positions_FB),
  )
  values_FN, *others = joined
  # Of equals, the earlier context: `top_k` takes the first.
  kept_FK, at_FK = jax.lax.top_k(values_FN, top.activations_FK.shape[1])
  return Top(
    kept_FK, *(jnp.take_along_axis(other, at_FK, 1) for other in others)
  )


def merged_tops(tops: list[Top]) -> Top:
  """What several parts of the contexts gave, as one of them would have, on the host."""
  if len(tops) == 1:
    return tops[0]
  k = tops[0].activations_FK.shape[1]
  joined = [np.concatenate(parts, 1) for parts in zip(*tops, strict=True)]
  activations_FN, contexts_FN, _ = joined
  order_FK = np.lexsort((contexts_FN, -activations_FN))[:, :k]
  return Top(*(np.take_along_axis(v, order_FK, 1) for v in joined))
