"""Writes a store shard by shard; started again, it goes on where it was."""

import concurrent.futures
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from gsae_jax.activations import layout, verify
from gsae_jax.activations import shards as shards_lib
from gsae_jax.activations import store as store_lib
from gsae_jax.activations.shards import RECORDS
from gsae_jax.errors import UserError

_CHECKED_AT_ONCE = 64  # Shards; a few small reads each.


class StoreWriter:
  """Writes the shards of one store.

  A shard is finished when its record is there, which is written last. Files
  appear whole, and a shard has the same rows whoever makes it, so that writing
  one again, or twice at the same time, is harmless.

  Attributes:
    encodings: how each site is stored.
    missing: bool `[shards]`, those that are still to be written.
    rows_written: by this writer, so far.
    row_bytes: over all arrays.
  """

  def __init__(
    self,
    path: str,
    *,
    identity: dict[str, Any],
    provenance: dict[str, Any],
    widths: Mapping[str, int],
    rows: int,
    shard_rows: int,
    chunk_rows: int,
    buffer_rows: int,
    dtype: str,
    make_encodings: Callable[[], Mapping[str, layout.Encoding | None]],
    missing: np.ndarray | None = None,
  ):
    """Opens or creates the store.

    Args:
      path: local folder, gs:// or s3://.
      identity: everything that determines the content.
      provenance: where that came from, for people; may differ on resuming.
      widths: D by site.
      rows: N; the last shard holds what is left over.
      shard_rows: rows of a shard.
      chunk_rows: rows of an inner chunk, a divisor of `shard_rows`.
      buffer_rows: rows that are made together, a multiple of `shard_rows`.
      dtype: 'bfloat16' or 'float32'.
      make_encodings: how to store each site; asked only when the store is new,
        because they are part of it.
      missing: bool `[shards]`, when somebody else has looked already.

    Raises:
      UserError: another store is there, or the place cannot be written.
    """
    self.path = path
    self.rows = rows
    self.shards = -(-rows // shard_rows)
    self.rows_written = 0
    self._shard_rows = shard_rows
    self._chunk_rows = chunk_rows
    self._per_buffer = buffer_rows // shard_rows
    self._provenance = provenance
    self._header: dict[str, Any] = {
      'schema': layout.SCHEMA,
      'identity': identity,
      'content_hash': None,  # Of the identity and of:
      'encodings': None,
      'rows': rows,
      'shard_rows': shard_rows,
      'chunk_rows': chunk_rows,
      'dtype': dtype,
      'widths': dict(widths),
    }
    self.row_bytes = layout.row_bytes(self._header)
    with layout.accessing(path, 'write'):
      self._kv = layout.open_kvstore(path)
      finished = self._claim(make_encodings)
      self.encodings = layout.encodings_of(self._header)
      self._arrays = {
        name: self._open(name, spec)
        for name, spec in layout.array_specs(path, self._header).items()
      }
      if missing is None:
        missing = verify.missing_shards(
          path, self._header, self._kv, self._arrays
        )
      self.missing = missing
      if self.missing.any() and finished:
        self._write_manifest({})  # Unfinished again, until they are there.
    self._check_space()
    self._writing: list[concurrent.futures.Future] = []
    # Of two, one computes while the other waits for the disk.
    self._threads = concurrent.futures.ThreadPoolExecutor(2, 'store-writer')

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    """Finishes the shards in hand and drops those that wait."""
    self._threads.shutdown(cancel_futures=True)

  def _claim(self, make_encodings) -> bool:
    """Makes the place this store's; whether it was finished already."""
    manifest = layout.read_manifest(self.path)
    if manifest is None:
      self._header['encodings'] = {
        site: e and {'mean': e.mean_D.tolist(), 'scale': float(e.scale)}
        for site, e in make_encodings().items()
      }
      self._header['content_hash'] = layout.content_hash(self._header)
      none = self._kv.read(layout.MANIFEST).result()
      if none.state == 'missing':
        self._write_manifest({}, over=none.stamp.generation)
      # Somebody else may have been quicker; or there is no such bucket, of
      # which S3 says no word.
      manifest = layout.read_manifest(self.path)
      if manifest is None:
        raise UserError(
          f'--store: cannot write {self.path}; check that the bucket exists'
        )
    derived = 'content_hash', 'encodings'
    want = {k: v for k, v in self._header.items() if k not in derived}
    different = store_lib.differences({k: manifest.get(k) for k in want}, want)
    if different:
      raise UserError(
        f'--store: {self.path} holds another store ({different[0]}); give '
        'another folder'
      )
    self._header |= {name: manifest[name] for name in derived}
    return 'sites' in manifest

  def _open(self, name: str, spec: dict[str, Any]) -> ts.TensorStore:
    """An array, made anew where its metadata are not those that they must be."""
    try:
      return ts.open(spec, create=True, open=True).result()
    except ValueError as e:
      if not layout.is_damage(e):
        raise
      self._kv.write(f'{name}/zarr.json', None).result()
      return ts.open(spec, create=True, open=True).result()

  def _bounds(self, shard: int) -> tuple[int, int]:
    start = shard * self._shard_rows
    return start, min(start + self._shard_rows, self.rows)

  def rows_of(self, shards) -> int:
    return sum(stop - start for start, stop in map(self._bounds, shards))

  def _check_space(self) -> None:
    if '://' in self.path:
      return
    need = self.rows_of(np.flatnonzero(self.missing)) * self.row_bytes
    free = shutil.disk_usage(layout.kvstore_spec(self.path)['path']).free
    if need > free:
      raise UserError(
        f'--store: {self.path} has {free / 1e9:.2f} GB free, and the shards '
        f'still to be written take {need / 1e9:.2f} GB; ask for fewer '
        'store.tokens or give another disk'
      )

  def missing_buffers(self) -> list[int]:
    """Buffers with a missing shard, ascending."""
    return sorted(
      set((np.flatnonzero(self.missing) // self._per_buffer).tolist())
    )

  def put(self, buffer: int, values: Mapping[str, np.ndarray]) -> None:
    """Starts writing the missing shards of a buffer.

    Waits for the buffer before it, so that there are two in memory at most.

    Args:
      buffer: its number.
      values: its rows: the row arrays, and `[rows, D]` for every site, encoded.
        They must not be changed any more.

    Raises:
      UserError: the buffer before it could not be written.
    """
    self.flush()
    first = buffer * self._per_buffer
    offset = first * self._shard_rows
    for shard in range(first, min(first + self._per_buffer, self.shards)):
      if self.missing[shard]:
        start, stop = self._bounds(shard)
        part = slice(start - offset, stop - offset)
        named = {
          name if name in layout.ROW_ARRAYS else f'{name}/activations': v[part]
          for name, v in values.items()
        }
        task = self._threads.submit(self._write, shard, named)
        self._writing.append(task)

  def flush(self) -> None:
    """Waits until everything that was put is on storage.

    Raises:
      UserError: something could not be written.
    """
    for task in self._writing:
      task.result()
    self._writing.clear()

  def _write(self, shard: int, values: Mapping[str, np.ndarray]) -> None:
    start, stop = self._bounds(shard)
    try:
      write = lambda name: self._arrays[name][start:stop].write(
        values[name], can_reference_source_data_indefinitely=True
      )
      futures = {name: write(name) for name in values}
      record = shards_lib.make_record(values, self.encodings, self._chunk_rows)
      for name, future in futures.items():
        try:
          future.result()
        except ValueError as e:
          if not layout.is_damage(e):
            raise
          # The last shard is not full. TensorStore reads what is there before it
          # writes a part, and cannot where that is damaged.
          self._kv.write(shards_lib.shard_key(name, shard), None).result()
          write(name).result()
      raw = record.to_json(self._header['content_hash'], shard)
      self._kv.write(shards_lib.shard_key(RECORDS, shard), raw).result()
    except UserError:
      raise
    except (ValueError, OSError) as e:
      raise UserError(
        f'--store: cannot write shard {shard} of {self.path}: '
        f'{layout.reason(e)}; what is finished stays, and the same command '
        'goes on from there'
      ) from e
    self.missing[shard] = False
    self.rows_written += stop - start

  def finish(self) -> None:
    """Writes the statistics into the manifest, when every shard is there.

    Raises:
      UserError: they are not, or somebody changed the manifest meanwhile.
    """
    with layout.accessing(self.path, 'read'):
      before = self._kv.read(layout.MANIFEST).result().stamp.generation
      found = shards_lib.listed(self._kv, [])[RECORDS]
    if not found >= set(range(self.shards)):
      raise UserError(
        f'--store: {self.path} lacks shards that other processes were to '
        'write; run the same gsae_jax.harvest command again'
      )
    widths = self._header['widths']
    sums = {site: np.zeros(width) for site, width in widths.items()}
    norms, squares = dict.fromkeys(widths, 0.0), dict.fromkeys(widths, 0.0)
    for i in range(0, self.shards, _CHECKED_AT_ONCE):
      numbers = range(i, min(i + _CHECKED_AT_ONCE, self.shards))
      reads = [self._kv.read(shards_lib.shard_key(RECORDS, s)) for s in numbers]
      for shard, read in zip(numbers, reads, strict=True):
        try:
          record = shards_lib.arrived_record(
            read, self.path, self._header['content_hash'], shard
          )
        except shards_lib.Damaged as e:
          key = shards_lib.shard_key(RECORDS, shard)
          raise UserError(
            f'--store: {self.path}/{key}: {e}; run the same command again'
          ) from e
        for site in widths:
          sums[site] += record.sums[site]
          norms[site] += record.norms[site]
          squares[site] += record.squares[site]
    sites = {
      site: {
        'mean': (sums[site] / self.rows).tolist(),
        'mean_norm': norms[site] / self.rows,
        'mean_squared_norm': squares[site] / self.rows,
      }
      for site in widths
    }
    if not self._write_manifest({'sites': sites}, over=before):
      raise UserError(
        f'--store: {self.path}: somebody else changed the manifest while the '
        'store was being finished; run the same gsae_jax.harvest command again'
      )

  def _write_manifest(
    self, more: dict[str, Any], *, over: bytes | None = None
  ) -> bool:
    manifest = self._header | {'provenance': self._provenance} | more
    return layout.write_manifest(self.path, manifest, over=over)
