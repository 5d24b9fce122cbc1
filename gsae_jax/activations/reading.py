"""Reads units of a store into memory, a few at a time, and checks them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorstore as ts

from gsae_jax.activations import shards as shards_lib
from gsae_jax.activations.layout import open_kvstore, reading_context
from gsae_jax.errors import UserError

if TYPE_CHECKING:  # Which has a reader of its own.
  from gsae_jax.activations.store import Store

_CACHE_BYTES = 64 * 2**20  # Shard indices, 16 bytes a chunk.
_UNDER_WAY = 64 * 2**20  # Bytes that are being read.


class Reader:
  """Opens some sites of a store.

  Attributes:
    store: the store.
    unit: rows that are read at a time.
    arrays: by site.
    bytes_read: rows that arrived so far.
  """

  def __init__(self, store: 'Store', sites: Sequence[str], unit: int):
    self.store = store
    self.unit = unit
    self.bytes_read = 0
    context = reading_context(_CACHE_BYTES)
    self.arrays = {
      site: store.array(f'{site}/activations', context=context)
      for site in sites
    }
    self._kv = open_kvstore(store.path)
    self._known: dict[int, dict[str, np.ndarray]] = {}
    self._spare: dict[str, list[np.ndarray]] = {}

  def memory(self, site: str, units: int) -> np.ndarray:
    """An array for so many units, used before if there is one.

    Fresh memory costs as much as reading: the system hands it out in zeros.
    """
    shape = units * self.unit, self.store.sites[site].width
    spare = self._spare.setdefault(site, [])
    for i, rows_ND in enumerate(spare):
      if rows_ND.shape == shape:
        return spare.pop(i)
    return np.empty(shape, self.arrays[site].dtype.numpy_dtype)

  def take_back(self, site: str, rows_ND: np.ndarray) -> None:
    """Keeps the latest array of each site for `memory`."""
    self._spare[site] = [rows_ND]

  def read_records(self, units: np.ndarray) -> dict[int, ts.Future]:
    """Starts reading the records of shards that were not met before."""
    shards = np.unique(units * self.unit // self.store.shard_rows).tolist()
    return {
      s: self._kv.read(shards_lib.shard_key(shards_lib.RECORDS, s))
      for s in shards
      if s not in self._known
    }

  def keep_records(self, reads: dict[int, ts.Future]) -> None:
    """Waits for records and keeps what `check` needs of them."""
    for shard, read in reads.items():
      key = shards_lib.shard_key(shards_lib.RECORDS, shard)
      try:
        record = shards_lib.arrived_record(
          read, self.store.path, self.store.content_hash, shard
        )
      except shards_lib.Damaged as e:
        raise self._damaged(key, e) from e
      self._known[shard] = {
        site: record.fingerprints[f'{site}/activations'] for site in self.arrays
      }

  def activations(self, site: str, first: int, last: int) -> np.ndarray:
    """`[last - first, D]` of consecutive rows; units must be chunks."""
    units = np.arange(first // self.unit, -(-last // self.unit))
    start = int(units[0]) * self.unit
    stop = min((int(units[-1]) + 1) * self.unit, self.store.rows)
    records = self.read_records(units)
    read = self.arrays[site][start:stop].read()
    stored_ND = self.wait(site, int(units[0]), read)
    self.keep_records(records)
    self.check(site, units, stored_ND)
    stored_ND = stored_ND[first - start : last - start]
    encoding = self.store.sites[site].encoding
    return stored_ND if encoding is None else encoding.decode(stored_ND)

  def wait(
    self, site: str, unit: int, read: ts.Future | ts.WriteFutures
  ) -> Any:
    """What a read of a unit gives; UserError when it is lost or damaged."""
    shard = unit * self.unit // self.store.shard_rows
    key = shards_lib.shard_key(f'{site}/activations', shard)
    try:
      return shards_lib.arrived(read, f'{self.store.path}/{key}')
    except shards_lib.Damaged as e:
      raise self._damaged(key, e) from e

  def check(self, site: str, units: np.ndarray, rows_ND: np.ndarray) -> None:
    """Raises UserError unless the rows of the units are those that were written."""
    chunk = self.store.chunk_rows
    chunks = self.unit // chunk
    shards, firsts = np.divmod(units * self.unit, self.store.shard_rows)
    wanted = [
      self._known[shard][site][first : first + chunks]
      for shard, first in zip(
        shards.tolist(), (firsts // chunk).tolist(), strict=True
      )
    ]
    same = shards_lib.fingerprints(rows_ND, chunk) == np.concatenate(wanted)
    if not same.all():
      shard = shards[int(np.argmin(same)) // chunks]
      key = shards_lib.shard_key(f'{site}/activations', shard)
      raise self._damaged(key, 'its rows are not those that were written here')

  def _damaged(self, key: str, why: object) -> UserError:
    path = self.store.path
    return UserError(
      f'--store: {path}/{key}: {why}; run `python -m gsae_jax.store verify '
      f'{path} --repair`, and then the same gsae_jax.harvest again'
    )


class Pool:
  """Rows of some units, one unit after the other, as stored."""

  def __init__(self, reader: Reader, units: np.ndarray, sites: Sequence[str]):
    """Takes the memory and starts to read.

    Args:
      reader: of the store.
      units: numbers of the units.
      sites: which arrays.
    """
    self._reader = reader
    self._units = units
    self._rows = {site: reader.memory(site, len(units)) for site in sites}
    # TensorStore reads right into them.
    self._targets = {
      site: ts.array(rows_ND) for site, rows_ND in self._rows.items()
    }
    whole = sum(rows_ND.nbytes for rows_ND in self._rows.values())
    self._unit_bytes = whole // len(units)
    self._at_once = max(2, _UNDER_WAY // self._unit_bytes)
    self._records = reader.read_records(units)
    self._under_way: dict[int, dict[str, ts.WriteFutures]] = {}
    self._started = self._arrived = 0
    self._checked = False
    self._start()

  def _start(self) -> None:
    unit = self._reader.unit
    last = min(self._arrived + self._at_once, len(self._units))
    for i in range(self._started, last):
      first = int(self._units[i]) * unit
      self._under_way[i] = {
        site: target[i * unit : (i + 1) * unit].write(
          self._reader.arrays[site][first : first + unit]
        )
        for site, target in self._targets.items()
      }
    self._started = last

  def advance(self, count: int) -> None:
    """Waits until so many units have arrived, and keeps reading ahead."""
    while self._arrived < count:
      ready = min(count, self._started)
      for i in range(self._arrived, ready):
        for site, read in self._under_way.pop(i).items():
          self._reader.wait(site, int(self._units[i]), read)
      self._reader.bytes_read += (ready - self._arrived) * self._unit_bytes
      self._arrived = ready
      self._start()

  def rows(self) -> dict[str, np.ndarray]:
    """All rows by site, when they are what was written."""
    self.advance(len(self._units))
    if not self._checked:
      self._reader.keep_records(self._records)
      for site, rows_ND in self._rows.items():
        self._reader.check(site, self._units, rows_ND)
      self._checked = True
    return self._rows

  def release(self) -> None:
    """Gives the memory back for another pool; the rows are gone."""
    for site, rows_ND in self._rows.items():
      self._reader.take_back(site, rows_ND)
    self._rows, self._targets = {}, {}
