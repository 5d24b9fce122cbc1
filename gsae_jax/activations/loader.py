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
from jax.sharding import NamedSharding

from gsae_jax.activations.order import Shuffle
from gsae_jax.activations.placement import Placement, local_rows
from gsae_jax.activations.reading import Pool, Reader
from gsae_jax.activations.store import Store
from gsae_jax.errors import UserError


class Loader:
  """Batches of several sites' rows, the same rows for every site.

  Holds two rounds in memory, one in use and one that is being read while the
  first is used up; some 64 MB that are on their way (or two units, if they are
  larger); and for every shard that was read 8 bytes per chunk and site.

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
    self._unit = {'chunk': store.chunk_rows, 'shard': store.shard_rows}[unit]
    self._units = store.rows // self._unit
    self._per_round = shuffle_rows // self._unit
    self._batches = shuffle_rows // batch_size
    self._check_sizes(unit, shuffle_rows)
    self._slice = self._unit // self._batches
    self._sites = tuple(sites)
    self._reader = Reader(store, sites, self._unit)
    self._held: _Round | None = None  # The round that `rows_at` asked for last.
    self._whole: dict[str, np.ndarray] | None = None
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

  @property
  def bytes_read(self) -> int:
    """Of rows that arrived from the store so far, in this process."""
    return self._reader.bytes_read

  def units_at(self, number: int) -> np.ndarray:
    """The units of a round, in the order in which they are dealt out.

    Args:
      number: of the round, counted over all epochs.
    """
    epoch, i = divmod(number, self._units // self._per_round)
    first = i * self._per_round
    order = Shuffle(self._units, self._seed, epoch)
    return order(np.arange(first, first + self._per_round))

  def _deal(self, number: int) -> np.ndarray:
    """`[batches, B]`: which rows of the store a round's batches consist of."""
    units = self.units_at(number)
    rng = np.random.default_rng((self._seed, 1, number))
    rows_UR = np.tile(np.arange(self._unit), (len(units), 1))
    rows_UR = rng.permuted(rows_UR, axis=1) + units[:, None] * self._unit
    dealt = rows_UR.reshape(len(units), self._batches, self._slice)
    return dealt.transpose(1, 0, 2).reshape(self._batches, self.batch_size)

  def row_numbers(self, step: int) -> np.ndarray:
    """Where in the store the rows of batch `step` are, `[B]`."""
    number, i = divmod(step, self._batches)
    return self._deal(number)[i]

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
    sites = self._sites
    rows = local_rows(sharding, self.batch_size)
    place = Placement(self.store, sites, sharding, self.batch_size)
    begin, first = divmod(start, self._batches)
    following = _Round(self, begin, sites, rows)
    for number in itertools.count(begin + 1):
      current = following
      # The memory of the round before, which is used up, serves the next.
      following = _Round(self, number, sites, rows)
      for i in range(first, self._batches):
        yield place(current.batch(i))
        following.advance((i + 1) / self._batches)
      current.release()
      first = 0

  def _read_whole(self, sites: Sequence[str]) -> dict[str, np.ndarray]:
    whole: dict[str, np.ndarray] = {}
    for site in sites:
      pool = Pool(self._reader, np.arange(self._units), (site,))
      whole |= pool.rows()
    return whole


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
    units = loader.units_at(number)
    place_B = rows // loader._slice
    places = np.unique(place_B)
    self._count = len(places)
    self._pool: Pool | None = None
    self._whole = loader._whole
    shift_U = np.zeros(len(units), np.int64)
    if self._whole is None:
      self._pool = Pool(loader._reader, units[places], sites)
      # The pool has the units that are wanted here, one after the other.
      shift_U[places] = (np.arange(len(places)) - units[places]) * loader._unit
    self._rows_NB = loader._deal(number)[:, rows] + shift_U[place_B]

  def advance(self, share: float) -> None:
    """Reads on until that share of the round has arrived."""
    if self._pool:
      self._pool.advance(int(share * self._count))

  def release(self) -> None:
    """Gives its memory to a round to come."""
    if self._pool:
      self._pool.release()

  def batch(self, i: int) -> dict[str, np.ndarray]:
    """The wanted rows of one of its batches, as stored."""
    pools = self._pool.rows() if self._pool else self._whole
    assert pools is not None  # One of the two is there.
    return {
      site: pool_ND.take(self._rows_NB[i], axis=0)
      for site, pool_ND in pools.items()
    }
