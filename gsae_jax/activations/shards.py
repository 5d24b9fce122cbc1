"""A shard's record: the file that says it is finished, and what is in it.

    records/<shard>.json     fingerprints of every inner chunk of every array,
                             and the float64 sums over the shard's rows

It is written last. The checksums inside zarr's shards tell damage; the record
tells a whole and sound shard that belongs elsewhere.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from gsae_jax.activations.layout import (
  ROW_ARRAYS,
  Encoding,
  is_damage,
  reason,
  sha256_of,
)
from gsae_jax.errors import UserError

RECORDS = 'records'
_BLOCK = 1024  # Rows that are float64 at once.


@dataclasses.dataclass(frozen=True)
class Record:
  """What one shard must hold.

  Attributes:
    fingerprints: uint64 `[chunks]` by array name.
    sums: float64 `[D]` by site, of the activations.
    norms: sum of `||x||` by site.
    squares: sum of `||x||^2` by site.
  """

  fingerprints: dict[str, np.ndarray]
  sums: dict[str, np.ndarray]
  norms: dict[str, float]
  squares: dict[str, float]

  def to_json(self, store: str, shard: int) -> bytes:
    """The record as it is stored.

    Args:
      store: content hash of the store that the shard belongs to.
      shard: its number there.
    """
    hexadecimal = lambda v: v.astype('>u8').tobytes().hex()
    body = {
      'store': store,
      'shard': shard,
      'fingerprints': {k: hexadecimal(v) for k, v in self.fingerprints.items()},
      'sums': {k: v.tolist() for k, v in self.sums.items()},
      'norms': self.norms,
      'squares': self.squares,
    }
    return json.dumps(body | {'digest': sha256_of(body)}).encode()


def read_record(raw: bytes, store: str, shard: int) -> Record:
  """The other direction of `to_json`.

  Raises:
    Damaged: it is not what was written, or is of another store or shard.
  """
  try:
    body = json.loads(raw)
    digest = body.pop('digest')
    # A manifest in a record's place has a digest, and neither of these.
    place = body['store'], body['shard']
  except (
    ValueError, KeyError, AttributeError, TypeError, RecursionError
  ) as e:  # fmt: skip
    raise Damaged('the record is damaged') from e
  if digest != sha256_of(body):
    raise Damaged('the record is damaged')
  if place != (store, shard):
    raise Foreign(
      f'it is shard {body["shard"]} of the store {body["store"][:12]}'
    )
  numbers = lambda h: np.frombuffer(bytes.fromhex(h), '>u8').astype(np.uint64)
  return Record(
    fingerprints={k: numbers(v) for k, v in body['fingerprints'].items()},
    sums={k: np.array(v) for k, v in body['sums'].items()},
    norms=body['norms'],
    squares=body['squares'],
  )


class Damaged(Exception):
  """What is there is not what was written."""


class Foreign(Damaged):
  """A sound shard that belongs elsewhere."""


def arrived(read: ts.Future | ts.WriteFutures, key: str) -> Any:
  """What a read gives.

  Args:
    read: under way.
    key: what is being read, for the error.

  Raises:
    Damaged: it is lost, or its checksum does not hold.
    UserError: it cannot be told, because the storage does not answer or forbids.
  """
  try:
    return read.result()
  except ValueError as e:  # All of TensorStore's errors are.
    if is_damage(e):
      raise Damaged(reason(e)) from e
    raise UserError(f'--store: cannot read {key}: {reason(e)}') from e


def arrived_record(
  read: ts.Future, path: str, store: str, shard: int
) -> Record:
  """The record that a read gives; raises what `arrived` and `read_record` do."""
  key = f'{path}/{shard_key(RECORDS, shard)}'
  return read_record(arrived(read, key).value, store, shard)


def fingerprints(values: np.ndarray, chunk_rows: int) -> np.ndarray:
  """One uint64 for each inner chunk of consecutive rows.

  A row's bytes, padded with zeros to a multiple of eight, are summed as
  little-endian words; the sums of row i of the chunk are weighted with 2i + 1.
  All is modulo 2^64. It is as fast as memory, and enough to tell apart chunks
  whose own checksums hold.

  Args:
    values: `[rows, ...]`, beginning at a chunk's first row.
    chunk_rows: rows of a chunk; the last may have fewer.
  """
  raw = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
  if raw.shape[1] % 8:
    raw = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 8)))
  sums_N = raw.view('<u8').sum(1, dtype=np.uint64)
  numbers_N = np.arange(len(sums_N), dtype=np.uint64) % np.uint64(chunk_rows)
  sums_N *= np.uint64(2) * numbers_N + np.uint64(1)
  return np.add.reduceat(sums_N, np.arange(0, len(sums_N), chunk_rows))


def row_sums(
  stored_ND: np.ndarray, encoding: Encoding | None
) -> tuple[np.ndarray, float, float]:
  """Float64 sums over rows: activations, their norms, their squared norms."""
  total_D, norms, squares = np.zeros(stored_ND.shape[1]), 0.0, 0.0
  for start in range(0, len(stored_ND), _BLOCK):
    x_BD = stored_ND[start : start + _BLOCK]
    if encoding is None:
      x_BD = x_BD.astype(np.float64)
    else:
      x_BD = encoding.decode(x_BD, np.float64)
    total_D += x_BD.sum(0)
    squares_B = np.einsum('bd,bd->b', x_BD, x_BD)
    norms += float(np.sqrt(squares_B).sum())
    squares += float(squares_B.sum())
  return total_D, norms, squares


def make_record(
  values: Mapping[str, np.ndarray],
  encodings: Mapping[str, Encoding | None],
  chunk_rows: int,
) -> Record:
  """The record of a shard that is about to be written.

  Args:
    values: rows by array name.
    encodings: of each site.
    chunk_rows: rows of an inner chunk.
  """
  sums = {
    site: row_sums(values[f'{site}/activations'], encoding)
    for site, encoding in encodings.items()
  }
  for site, (_, _, squares) in sums.items():
    if not np.isfinite(squares):
      raise UserError(
        f'sites: activations of {site} are not all finite; run the language '
        'model in another lm.dtype'
      )
  return Record(
    fingerprints={k: fingerprints(v, chunk_rows) for k, v in values.items()},
    sums={site: total_D for site, (total_D, _, _) in sums.items()},
    norms={site: norms for site, (_, norms, _) in sums.items()},
    squares={site: squares for site, (_, _, squares) in sums.items()},
  )


def listed(kv: ts.KvStore, names: Iterable[str]) -> dict[str, set[int]]:
  """Shards that are there, by array name, and under `RECORDS`."""
  names = list(names)
  found: dict[str, set[int]] = {name: set() for name in [*names, RECORDS]}
  record = re.compile(rf'{RECORDS}/(\d+)\.json')
  # c/<shard>/0, or c/<shard> where rows are scalars; lock files may lie about.
  shard = re.compile(r'(.+)/c/(\d+)(/0)?')
  for raw in kv.list().result():
    key = raw.decode()
    if match := record.fullmatch(key):
      found[RECORDS].add(int(match[1]))
    elif (match := shard.fullmatch(key)) and match[1] in found:
      found[match[1]].add(int(match[2]))
  return found


def shard_key(name: str, shard: int) -> str:
  """The file of a shard: of an array, or its record."""
  if name == RECORDS:
    return f'{RECORDS}/{shard}.json'
  return f'{name}/c/{shard}' + ('' if name in ROW_ARRAYS else '/0')


def check_rows(
  record: Record,
  name: str,
  rows: np.ndarray,
  *,
  chunk_rows: int,
) -> None:
  """Raises Damaged when rows are not those that begin a shard.

  Args:
    record: the shard's.
    name: the array.
    rows: from the shard's first on, some or all.
    chunk_rows: rows of an inner chunk.
  """
  have = fingerprints(rows, chunk_rows)
  if not np.array_equal(have, record.fingerprints[name][: len(have)]):
    raise Damaged('its rows are not those that were written here')
