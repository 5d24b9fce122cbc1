"""Reads training batches: order from (seed, step) alone, so no state to save.

An epoch visits the blocks of `chunk_rows` rows once, in an order of its own; the
last of them that do not fill a batch are left to the next.
Rows of a block stay together, which is harmless because harvest has shuffled
them across contexts (see `source.py`).
"""

import collections
import functools
from collections.abc import Iterator

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import NamedSharding

from gsae_jax.activations.store import Store
from gsae_jax.errors import UserError

_CACHE_BYTES = 256 * 2**20  # Shard indices, and small stores whole.


@functools.lru_cache(maxsize=2)
def _order(blocks: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(blocks)


class Loader:
  """Batches of several sites' rows, the same rows for every site."""

  def __init__(
    self, store: Store, sites: tuple[str, ...], *, batch_size: int, seed: int
  ):
    """Opens the arrays.

    Raises:
      UserError: the batch does not consist of whole chunks, or is larger than
        the store.
    """
    if batch_size % store.chunk_rows:
      raise UserError(
        f'train.batch_size: {batch_size} is not a multiple of the store’s '
        f'chunk_rows, {store.chunk_rows}'
      )
    if batch_size > store.rows:
      raise UserError(
        f'train.batch_size: a batch of {batch_size} rows is larger than the '
        f'store at {store.path}, which holds {store.rows}'
      )
    self.batch_size = batch_size
    self._seed = seed
    self._chunk = store.chunk_rows
    self._blocks = store.rows // store.chunk_rows
    self._per_batch = batch_size // store.chunk_rows
    self._arrays = {
      site: store.array(f'{site}/activations', cache_bytes=_CACHE_BYTES)
      for site in sites
    }

  def blocks_at(self, step: int) -> np.ndarray:
    """Blocks of batch `step`, in the order in which they stand in it."""
    epoch, i = divmod(step, self._blocks // self._per_batch)
    order = _order(self._blocks, self._seed, epoch)
    return order[i * self._per_batch : (i + 1) * self._per_batch]

  def rows_at(self, step: int, site: str) -> np.ndarray:
    """All rows `[B, D]` of batch `step` at one site, on the host."""
    return self._gather(self._read(step, site, slice(None)))

  def _gather(self, futures: list[ts.Future]) -> np.ndarray:
    try:
      return np.concatenate([future.result() for future in futures])
    except ValueError as e:  # TensorStore's word for lost and for damaged data.
      raise UserError(
        f'--store: {str(e).split(" [")[0]}; delete that file and run '
        'gsae_jax.harvest again'
      ) from e

  def _read(self, step: int, site: str, which) -> list[ts.Future]:
    array = self._arrays[site]
    with ts.Batch() as batch:
      return [
        array[b * self._chunk : (b + 1) * self._chunk].read(batch=batch)
        for b in self.blocks_at(step)[which].tolist()
      ]

  def batches(
    self, sharding: NamedSharding, *, start: int, ahead: int = 4
  ) -> Iterator[dict[str, jax.Array]]:
    """Yields `{site: [B, D]}` from step `start` on, in the store's dtype.

    Args:
      sharding: of the batch axis; a process reads only rows of its devices.
      start: the first step.
      ahead: batches that are being read while one is in use.
    """
    mine = self._local_blocks(sharding)

    def read(step):  # TensorStore overlaps the reads; no threads of ours.
      return {site: self._read(step, site, mine) for site in self._arrays}

    queue = collections.deque(read(start + i) for i in range(ahead))
    step = start + ahead
    while True:
      futures = queue.popleft()
      queue.append(read(step))
      step += 1
      batch = {}
      for site, blocks in futures.items():
        x_BD = self._gather(blocks)
        batch[site] = jax.make_array_from_process_local_data(
          sharding, x_BD, (self.batch_size, x_BD.shape[1])
        )
      yield batch

  def _local_blocks(self, sharding: NamedSharding) -> list[int]:
    slices = sharding.addressable_devices_indices_map((self.batch_size,))
    rows = {r for (s,) in slices.values() for r in range(self.batch_size)[s]}
    blocks = sorted({r // self._chunk for r in rows})
    if len(blocks) * self._chunk != len(rows):
      raise UserError(
        f'train.batch_size: {self.batch_size} rows over the mesh’s data axis '
        f'cut a chunk of {self._chunk} rows; make it a larger multiple'
      )
    return blocks
