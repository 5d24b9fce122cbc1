"""Writes a store shard by shard; started again, it goes on where it was."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from gsae_jax.activations import store as store_lib
from gsae_jax.errors import UserError

Shard = Mapping[str, np.ndarray]


class StoreWriter:
  """Writes the shards of one store.

  A shard is finished when every array holds it: files appear whole, and
  `make_shard` gives the same rows each time, so that writing an interrupted
  shard again is harmless.
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
    dtype: str,
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
      dtype: 'bfloat16' or 'float32'.

    Raises:
      UserError: another store is there, or the place cannot be written.
    """
    self.path = path
    self.shards = -(-rows // shard_rows)
    self.rows = rows
    self.shard_rows = shard_rows
    self._widths = dict(widths)
    self._provenance = provenance
    self._header = {
      'schema': store_lib.SCHEMA,
      'identity': identity,
      'content_hash': store_lib.content_hash(identity),
      'rows': rows,
      'shard_rows': shard_rows,
      'chunk_rows': chunk_rows,
      'dtype': dtype,
    }
    try:
      self._check_or_write_manifest()
      self._arrays = {
        name: ts.open(
          store_lib.array_spec(
            path, name, shape=shape, dtype=kind, shard=shard, chunk=chunk
          ),
          create=True,
          open=True,
        ).result()
        for name, shape, kind, shard, chunk in self._layout(dtype, chunk_rows)
      }
    except UserError:
      raise
    except (ValueError, OSError) as e:
      # TensorStore's errors go on to list the spec; the first clause says why.
      raise UserError(
        f'--store: cannot write {path}: {str(e).split(" [")[0]}'
      ) from e

  def _layout(self, dtype: str, chunk: int):
    shard = self.shard_rows
    for name, kind in store_lib.ROW_ARRAYS.items():
      yield name, [self.rows], kind, shard, chunk
    for site, width in self._widths.items():
      yield f'{site}/activations', [self.rows, width], dtype, shard, chunk
      yield f'{site}/shard_sums', [self.shards, width], 'float64', 1, 1
      yield f'{site}/shard_squares', [self.shards], 'float64', 1, 1

  def _check_or_write_manifest(self) -> None:
    manifest = store_lib.read_manifest(self.path)
    if manifest is None:
      store_lib.write_manifest(self.path, self._manifest())
      return
    store_lib.check_schema(self.path, manifest)
    want = {k: v for k, v in self._header.items() if k != 'content_hash'}
    have = {k: manifest.get(k) for k in want}
    different = store_lib.differences(have, want)
    if different:
      raise UserError(
        f'--store: {self.path} holds another store ({different[0]}); give '
        'another folder'
      )

  def finished(self) -> set[int]:
    """Shards that every array holds already."""
    found = []
    for name in self._arrays:
      kv = ts.KvStore.open(store_lib.kvstore_spec(self.path, name)).result()
      keys = (key.decode().split('/') for key in kv.list().result())
      # Keys are c/<shard>/0 or c/<shard>; a killed writer leaves lock files.
      found.append(
        {
          int(k[1])
          for k in keys
          if k[0] == 'c' and all(map(str.isdigit, k[1:]))
        }
      )
    return set.intersection(*found)

  def write(self, shard: int, values: Shard) -> None:
    """Writes one shard: the row arrays, and `[rows, D]` for every site."""
    start = shard * self.shard_rows
    stop = min(start + self.shard_rows, self.rows)
    futures = []
    for name in store_lib.ROW_ARRAYS:
      futures.append(self._arrays[name][start:stop].write(values[name]))
    for site in self._widths:
      x_ND = values[site]
      x64_ND = x_ND.astype(np.float64)
      arrays = (
        ('activations', slice(start, stop), x_ND),
        ('shard_sums', shard, x64_ND.sum(0)),
        ('shard_squares', shard, (x64_ND**2).sum()),
      )
      for name, where, value in arrays:
        futures.append(self._arrays[f'{site}/{name}'][where].write(value))
    for future in futures:
      future.result()

  def run(self, make_shard: Callable[[int], Shard]) -> Iterator[int]:
    """Writes what is missing, then the statistics; yields rows written.

    The first number is of the rows that were there already.
    """
    done = self.finished()
    yield sum(map(self._rows_of, done))
    for shard in range(self.shards):
      if shard not in done:
        self.write(shard, make_shard(shard))
        yield self._rows_of(shard)
    self._finish()

  def _rows_of(self, shard: int) -> int:
    return min(self.shard_rows, self.rows - shard * self.shard_rows)

  def _finish(self) -> None:
    sites = {}
    for site, width in self._widths.items():
      sums_D = self._arrays[f'{site}/shard_sums'].read().result().sum(0)
      squares = self._arrays[f'{site}/shard_squares'].read().result().sum()
      sites[site] = {
        'width': width,
        'mean': (sums_D / self.rows).tolist(),
        'mean_squared_norm': float(squares / self.rows),
      }
    store_lib.write_manifest(self.path, self._manifest() | {'sites': sites})

  def _manifest(self) -> dict[str, Any]:
    return self._header | {'provenance': self._provenance}
