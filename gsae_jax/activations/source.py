"""Runs the language model to fill the shards of a store.

Rows reach the store in a random order: contexts are permuted over the whole
text, and rows within their shard. Both orders are functions of the seed, so
that any shard can be made alone and made again.
"""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gsae_jax.lm.text import Contexts
from gsae_jax.lm.weights import DTYPES, LanguageModel


class ShardSource:
  """Makes the shards of a store from contexts.

  Attributes:
    sites: names of the sites, all filled in one pass over the model.
  """

  def __init__(
    self,
    lm: LanguageModel,
    contexts: Contexts,
    *,
    sites: tuple[str, ...],
    rows: int,
    shard_rows: int,
    batch_contexts: int,
    dtype: str,
    seed: int,
    mesh: jax.sharding.Mesh,
  ):
    """Plans the shards; nothing runs yet.

    Args:
      lm: the language model.
      contexts: at least `rows` of their positions are in the mask.
      sites: which activations to keep.
      rows: N.
      shard_rows: rows of a shard.
      batch_contexts: contexts per forward pass, a multiple of the mesh's
        'data' axis.
      dtype: the store's.
      seed: of both orders.
      mesh: contexts are spread over 'data'.
    """
    self.sites = sites
    self._contexts = contexts
    self._rows = rows
    self._shard_rows = shard_rows
    self._batch = batch_contexts
    self._seed = seed
    self._order_C = np.random.default_rng((seed, 0)).permutation(
      len(contexts.ids_CL)
    )
    counts_C = contexts.mask_CL.sum(1)[self._order_C]
    self._ends_C = np.cumsum(counts_C)
    replicated = NamedSharding(mesh, PartitionSpec())
    self._split = NamedSharding(mesh, PartitionSpec('data'))
    self._params = jax.device_put(lm.params, replicated)

    @functools.partial(jax.jit, out_shardings=self._split)
    def forward(params, ids_BL):
      _, taken = lm.module.apply(
        {'params': params}, ids_BL, sites=sites, logits=False
      )
      return {site: taken[site].astype(DTYPES[dtype]) for site in sites}

    self.forward = forward

  def __call__(self, shard: int) -> dict[str, np.ndarray]:
    """The rows of one shard: the row arrays, and `[rows, D]` for every site."""
    start = shard * self._shard_rows
    stop = min(start + self._shard_rows, self._rows)
    first = int(np.searchsorted(self._ends_C, start, side='right'))
    last = int(np.searchsorted(self._ends_C, stop, side='left'))
    chosen_C = self._order_C[first : last + 1]
    before = int(self._ends_C[first - 1]) if first else 0
    # A context that straddles two shards runs in both.
    keep = np.arange(start - before, stop - before)
    keep = np.random.default_rng((self._seed, 1, shard)).permutation(keep)
    mask_CL = self._contexts.mask_CL[chosen_C]
    positions_CL = np.broadcast_to(
      np.arange(mask_CL.shape[1], dtype=np.int32), mask_CL.shape
    )
    values = {
      'token_ids': self._contexts.ids_CL[chosen_C][mask_CL][keep],
      'positions': positions_CL[mask_CL][keep],
      'special': self._contexts.special_CL[chosen_C][mask_CL][keep],
    }
    parts = {site: [] for site in self.sites}
    for i in range(0, len(chosen_C), self._batch):
      ids_BL = self._contexts.ids_CL[chosen_C[i : i + self._batch]]
      mask_BL = mask_CL[i : i + self._batch]
      missing = self._batch - len(ids_BL)
      ids_BL = np.pad(ids_BL, ((0, missing), (0, 0)))
      taken = self.forward(self._params, jax.device_put(ids_BL, self._split))
      for site, x_BLD in jax.device_get(taken).items():
        parts[site].append(x_BLD[: len(mask_BL)][mask_BL])
    for site in self.sites:
      values[site] = np.concatenate(parts[site])[keep]
    return values
