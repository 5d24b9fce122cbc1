"""From rows on a host to global arrays on a mesh."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding

from gsae_jax.activations.store import Store


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
  """Rows of a batch that this process's devices hold, ascending."""
  slices = sharding.addressable_devices_indices_map((batch_size,)).values()
  everything = np.arange(batch_size)
  return np.unique(
    np.concatenate([everything[s] for (s,) in filter(None, slices)])
  )


class Placement:
  """Makes global arrays of activations from rows as they are stored."""

  def __init__(
    self,
    store: Store,
    sites: Sequence[str],
    sharding: NamedSharding,
    batch_size: int,
  ):
    self._sharding = sharding
    self._batch_size = batch_size
    # Decoded behind the transfer, which is of half the bytes.
    self._decode = {
      site: None if e is None else jax.jit(e.decode, out_shardings=sharding)
      for site in sites
      for e in [store.sites[site].encoding]
    }

  def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    batch = {}
    for site, x_BD in rows.items():
      batch[site] = jax.make_array_from_process_local_data(
        self._sharding, x_BD, (self._batch_size, x_BD.shape[1])
      )
      decode = self._decode[site]
      if decode is not None:
        batch[site] = decode(batch[site])
    return batch
