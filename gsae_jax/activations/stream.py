"""Training batches straight from the language model, without a store.

A buffer of rows is filled, permuted and used up, and then the next: for people
who have the text and no disk. Every epoch runs the model again.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from gsae_jax.activations.forward import nothing
from gsae_jax.activations.layout import Encoding, content_hash
from gsae_jax.activations.placement import Placement, local_rows
from gsae_jax.activations.shards import row_sums
from gsae_jax.activations.source import Source
from gsae_jax.activations.store import Site, Store
from gsae_jax.errors import UserError


class Stream:
  """Has the interface of `Loader`, and a `Store` that says what it gives.

  Holds one buffer in memory. What a step gets is a function of the seed, but
  starting in the middle of a buffer costs making it.

  Attributes:
    store: identity and statistics; the latter are those of the first buffer.
    bytes_read: 0; there is no store to read.
  """

  bytes_read = 0

  def __init__(
    self,
    source: Source,
    *,
    identity: dict[str, Any],
    provenance: dict[str, Any],
    batch_size: int,
    centre: bool,
    dtype: str,
    tick: Callable[[], None] = nothing,
  ):
    """Fills the first buffer.

    Args:
      source: makes the buffers, every site of them.
      identity: of what the source makes.
      provenance: where that came from.
      batch_size: rows of a batch.
      centre: whether a mean is removed before the cast, as in a store.
      dtype: of the buffer.
      tick: called between passes of the model for a batch; may raise, to leave.

    Raises:
      UserError: the buffer is not made of batches, or larger than the text.
    """
    rows = source.buffer_rows
    if rows % batch_size:
      raise UserError(
        f'loader.shuffle_rows: {rows} is not a multiple of train.batch_size, '
        f'{batch_size}'
      )
    if rows > source.rows:
      raise UserError(
        f'loader.shuffle_rows: {rows} is more than the {source.rows} rows of '
        'the stream (store.tokens)'
      )
    self.batch_size = batch_size
    self._tick = tick
    self._source = source
    self._encodings: Mapping[str, Encoding | None]
    self._encodings = dict.fromkeys(source.sites)
    if centre:
      self._encodings = source.encodings()
    self._held: tuple[int, dict[str, np.ndarray]] | None = None
    self._per_buffer = rows // batch_size
    self._full_buffers = source.rows // rows  # An epoch leaves the rest out.
    statistics = {
      site: row_sums(values, self._encodings[site])
      for site, values in self._buffer(0).items()
    }
    identity = identity | {'streamed': True}
    self.store = Store(
      path='the stream',
      identity=identity,
      provenance=provenance,
      content_hash=content_hash({'identity': identity, 'encodings': None}),
      rows=source.rows,
      shard_rows=rows,
      chunk_rows=1,
      dtype=dtype,
      sites={
        site: Site(
          width=source.widths[site],
          mean_D=total_D / rows,
          mean_norm=norms / rows,
          mean_squared_norm=squares / rows,
          encoding=self._encodings[site],
        )
        for site, (total_D, norms, squares) in statistics.items()
      },
    )

  def _buffer(self, number: int, tick=nothing) -> dict[str, np.ndarray]:
    """Rows of a buffer, counted over all epochs."""
    if self._held is None or self._held[0] != number:
      self._held = None  # Not two at a time.
      epoch, i = divmod(number, self._full_buffers)
      if epoch != self._source.epoch:
        self._source.set_epoch(epoch)
      values = self._source.buffer(i, self._encodings, tick)
      self._held = number, {site: values[site] for site in self._source.sites}
    return self._held[1]

  def _stored(self, step: int, tick=nothing) -> dict[str, np.ndarray]:
    number, i = divmod(step, self._per_buffer)
    rows = slice(i * self.batch_size, (i + 1) * self.batch_size)
    return {site: v[rows] for site, v in self._buffer(number, tick).items()}

  def rows_at(self, step: int, site: str) -> np.ndarray:
    """All activations `[B, D]` of batch `step` at one site, on the host."""
    stored_BD = self._stored(step)[site]
    encoding = self._encodings[site]
    return stored_BD if encoding is None else encoding.decode(stored_BD)

  def batches(
    self, sharding: NamedSharding, *, start: int
  ) -> Iterator[dict[str, jax.Array]]:
    """Yields the activations `{site: [B, D]}` from step `start` on."""
    place = Placement(self.store, self._source.sites, sharding, self.batch_size)
    rows = local_rows(sharding, self.batch_size)
    for step in itertools.count(start):
      stored = self._stored(step, self._tick)
      yield place({k: v[rows] for k, v in stored.items()})
