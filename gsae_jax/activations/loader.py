"""Reads training batches: order from (seed, step) alone, so no state to save.

An epoch visits the store's units (inner chunks or whole shards) in an order of
its own. A round reads as many as make `shuffle_rows` rows, permutes the rows of
each, and deals them out evenly over its batches: every batch has a few rows of
every unit of its round, and the rows of a unit never all meet.
"""

import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import NamedSharding

from gsae_jax.activations import shards as shards_lib
from gsae_jax.activations.layout import open_kvstore, reason
from gsae_jax.activations.order import Shuffle
from gsae_jax.activations.store import Store
from gsae_jax.errors import UserError

_CACHE_BYTES = 64 * 2**20  # Shard indices, 16 bytes a chunk.


class Loader:
  """Batches of several sites' rows, the same rows for every site.

  Holds two rounds in memory, one in use and one that is being read, and for
  every shard that was read 8 bytes per chunk and site.

  Attributes:
    store: where the rows are.
  """

  def __init__(
    self,
    store: Store,
    sites: Sequence[str],
    *,
    batch_size: int,
    seed: int,
    unit: str,
    shuffle_rows: int,
    in_memory: bool = False,
  ):
    """Opens the arrays.

    Args:
      store: where the rows are.
      sites: which arrays to read.
      batch_size: rows of a batch, over all processes.
      seed: of the order.
      unit: 'chunk', best on a disk, or 'shard', best on object storage.
      shuffle_rows: rows that are mixed in memory at a time.
      in_memory: read the sites whole, now, and give the same batches.

    Raises:
      UserError: the sizes do not fit, or the store is damaged.
    """
    self.batch_size = batch_size
    self._seed = seed
    self.store = store
    self._kv = open_kvstore(store.path)
    self._unit = {'chunk': store.chunk_rows, 'shard': store.shard_rows}[unit]
    self._units = store.rows // self._unit
    self._per_round = shuffle_rows // self._unit
    self._batches = shuffle_rows // batch_size
    self._check_sizes(unit, shuffle_rows)
    self._slice = self._unit // self._batches
    self._fingerprints: dict[int, dict[str, np.ndarray]] = {}
    self._arrays = {
      site: store.array(f'{site}/activations', cache_bytes=_CACHE_BYTES)
      for site in sites
    }
    self._held = None  # The round that `rows_at` asked for last.
    self._whole = None
    if in_memory:
      self._whole = self._read_whole(sites)

  def _check_sizes(self, unit: str, shuffle_rows: int) -> None:
    for value, name in (
      (self.batch_size, 'train.batch_size'),
      (self._unit, f'the {unit}_rows of the store'),
    ):
      if shuffle_rows % value:
        raise UserError(
          f'loader.shuffle_rows: {shuffle_rows} is not a multiple of {name}, '
          f'{value}'
        )
    if self._units < self._per_round:
      raise UserError(
        f'loader.shuffle_rows: {shuffle_rows} is larger than the store at '
        f'{self.store.path}, which holds {self._units} whole {unit}s of '
        f'{self._unit} rows'
      )
    if self._unit % self._batches:
      raise UserError(
        f'loader.shuffle_rows: {shuffle_rows} makes {self._batches} batches of '
        f'{self.batch_size}, over which {self._unit} rows of a {unit} cannot '
        f'be dealt out evenly; their number must divide {self._unit}'
      )

  def units_at(self, number: int) -> np.ndarray:
    """The units of a round, in the order in which they are dealt out.

    Args:
      number: of the round, counted over all epochs.
    """
    epoch, i = divmod(number, self._units // self._per_round)
    first = i * self._per_round
    order = Shuffle(self._units, self._seed, epoch)
    return order(np.arange(first, first + self._per_round))

  def rows_at(self, step: int, site: str) -> np.ndarray:
    """All activations `[B, D]` of batch `step` at one site, on the host."""
    number, i = divmod(step, self._batches)
    if self._held is None or self._held.key != (number, (site,)):
      self._held = None  # Not two at a time.
      everything = np.arange(self.batch_size)
      self._held = _Round(self, number, (site,), everything)
    stored_BD = self._held.batch(i)[site]
    encoding = self.store.sites[site].encoding
    return stored_BD if encoding is None else encoding.decode(stored_BD)

  def batches(
    self, sharding: NamedSharding, *, start: int
  ) -> Iterator[dict[str, jax.Array]]:
    """Yields the activations `{site: [B, D]}` from step `start` on.

    Args:
      sharding: of the batch axis; a process reads only what its devices hold.
      start: the first step.
    """
    sites = tuple(self._arrays)
    rows = local_rows(sharding, self.batch_size)
    place = Placement(self.store, sites, sharding, self.batch_size)
    begin, first = divmod(start, self._batches)
    following = _Round(self, begin, sites, rows)
    for number in itertools.count(begin + 1):
      current = following
      current.wait()
      following = _Round(self, number, sites, rows)
      for i in range(first, self._batches):
        yield place(current.batch(i))
      first = 0

  def _read_whole(self, sites: Sequence[str]) -> dict[str, np.ndarray]:
    whole = {
      site: np.empty(
        (self._units * self._unit, self.store.sites[site].width),
        self._arrays[site].dtype.numpy_dtype,
      )
      for site in sites
    }
    for first in range(0, self._units, self._per_round):
      units = np.arange(first, min(first + self._per_round, self._units))
      at = first * self._unit
      for site, rows_ND in self._read(units, sites)().items():
        whole[site][at : at + len(rows_ND)] = rows_ND
    return whole

  def _read(self, units: np.ndarray, sites: Sequence[str]):
    """Starts reading units; the result waits, checks and joins them."""
    shard_of = units * self._unit // self.store.shard_rows
    new = sorted({*shard_of.tolist()} - self._fingerprints.keys())
    records = {
      s: self._kv.read(shards_lib.shard_key(shards_lib.RECORDS, s)) for s in new
    }
    with ts.Batch() as batch:
      reads = {
        site: [
          self._arrays[site][u * self._unit : (u + 1) * self._unit].read(
            batch=batch
          )
          for u in units.tolist()
        ]
        for site in sites
      }

    def join() -> dict[str, np.ndarray]:
      for shard, read in records.items():
        self._keep_fingerprints(shard, read)
      return {site: self._join(site, units, r) for site, r in reads.items()}

    return join

  def _keep_fingerprints(self, shard: int, read: ts.Future) -> None:
    try:
      record = shards_lib.read_record(
        read.result().value, self.store.content_hash, shard
      )
    except ValueError as e:
      key = shards_lib.shard_key(shards_lib.RECORDS, shard)
      raise self._damaged(key, reason(e)) from e
    self._fingerprints[shard] = {
      site: record.fingerprints[f'{site}/activations'] for site in self._arrays
    }

  def _join(
    self, site: str, units: np.ndarray, reads: list[ts.Future]
  ) -> np.ndarray:
    """The units' rows, one after the other, when they are what was written."""
    chunk = self.store.chunk_rows
    width = self.store.sites[site].width
    dtype = self._arrays[site].dtype.numpy_dtype
    pool_ND = np.empty((len(units) * self._unit, width), dtype)
    for i, (unit, read) in enumerate(zip(units.tolist(), reads, strict=True)):
      shard, first = divmod(unit * self._unit, self.store.shard_rows)
      try:
        rows_ND = read.result()
      except ValueError as e:  # TensorStore's word for lost and damaged data.
        raise self._damaged(self._key(site, shard), reason(e)) from e
      have = shards_lib.fingerprints(rows_ND, chunk)
      first //= chunk
      want = self._fingerprints[shard][site][first : first + len(have)]
      if not np.array_equal(have, want):
        raise self._damaged(
          self._key(site, shard), 'its rows are not those that were written'
        )
      pool_ND[i * self._unit : (i + 1) * self._unit] = rows_ND
      reads[i] = None  # Not twice in memory.
    return pool_ND

  def _key(self, site: str, shard: int) -> str:
    return shards_lib.shard_key(f'{site}/activations', shard)

  def _damaged(self, key: str, why: str) -> UserError:
    path = self.store.path
    return UserError(
      f'--store: {path}/{key}: {why}; run `python -m gsae_jax.store verify '
      f'{path} --repair`, and then the same gsae_jax.harvest again'
    )


class _Round:
  """The batches of one round, as far as this process needs them."""

  def __init__(
    self, loader: Loader, number: int, sites: tuple[str, ...], rows: np.ndarray
  ):
    """Starts reading.

    Args:
      loader: whose round.
      number: counted over all epochs.
      sites: to read.
      rows: of each batch that are wanted here, ascending.
    """
    self.key = (number, sites)
    self._batches = loader._batches
    self._pools = None
    units = loader.units_at(number)
    place_B, slot_B = np.divmod(rows, loader._slice)
    places = np.unique(place_B)
    if loader._whole is None:
      self._join = loader._read(units[places], sites)
      offset_U = np.zeros(len(units), np.int64)
      offset_U[places] = np.arange(len(places)) * loader._unit
    else:
      self._join = lambda: loader._whole
      offset_U = units * loader._unit
    # The same draw on every process, whatever it needs of it.
    rng = np.random.default_rng((loader._seed, 1, number))
    dealt_UR = rng.permuted(
      np.tile(np.arange(loader._unit), (len(units), 1)), axis=1
    )
    first_N1 = np.arange(loader._batches)[:, None] * loader._slice
    self._rows_NB = offset_U[place_B] + dealt_UR[place_B, first_N1 + slot_B]

  def wait(self) -> None:
    if self._pools is None:
      self._pools = self._join()

  def batch(self, i: int) -> dict[str, np.ndarray]:
    """The wanted rows of one of its batches, as stored."""
    self.wait()
    return {
      site: pool_ND.take(self._rows_NB[i], axis=0)
      for site, pool_ND in self._pools.items()
    }


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
  """Rows of a batch that this process's devices hold, ascending."""
  slices = sharding.addressable_devices_indices_map((batch_size,)).values()
  everything = np.arange(batch_size)
  return np.unique(np.concatenate([everything[s] for (s,) in slices]))


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
      site: e and jax.jit(e.decode, out_shardings=sharding)
      for site in sites
      for e in [store.sites[site].encoding]
    }

  def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    batch = {}
    for site, x_BD in rows.items():
      batch[site] = jax.make_array_from_process_local_data(
        self._sharding, x_BD, (self._batch_size, x_BD.shape[1])
      )
      if self._decode[site]:
        batch[site] = self._decode[site](batch[site])
    return batch
