"""Reads a whole store, finished or not, and says which files are bad."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from gsae_jax.activations import layout
from gsae_jax.activations import shards as shards_lib
from gsae_jax.activations.shards import RECORDS
from gsae_jax.errors import UserError

_AT_ONCE = 64  # Shards; a few small reads each.


@dataclasses.dataclass(frozen=True)
class Damage:
  """A bad file.

  Attributes:
    shard: which shard it belongs to; None is all of an array's.
    key: its name below the store's path.
    why: what is wrong with it.
  """

  shard: int | None
  key: str
  why: str


class Verifier:
  """Checks a store's shards one after the other.

  Attributes:
    manifest: as it was read.
    shards: how many there are to be.
    there: shards that have a record.
  """

  def __init__(self, path: str):
    """Reads the manifest and lists the files.

    Raises:
      UserError: there is no manifest, or it is damaged.
    """
    manifest = layout.read_manifest(path)
    if manifest is None:
      raise UserError(
        f'no activation store at {path}: it has no {layout.MANIFEST}'
      )
    self.path = path
    self.manifest = manifest
    self.shards = -(-manifest['rows'] // manifest['shard_rows'])
    self._kv = layout.open_kvstore(path)
    self._specs = layout.array_specs(path, manifest)
    with layout.accessing(path, 'list'):
      self._found = shards_lib.listed(self._kv, self._specs)
    self.there = sorted(self._found[RECORDS] & set(range(self.shards)))

  def damage(self) -> Iterator[list[Damage]]:
    """Yields what is bad in one shard after the other, and first in none.

    Shards without a record are not begun or not finished, and no damage; but a
    store whose manifest says that it is finished must have them all.
    """
    arrays = {}
    bad = []
    for name, spec in self._specs.items():
      try:
        arrays[name] = layout.open_array(spec)
      except UserError as e:
        if not layout.is_damage(e.__cause__):
          raise
        if self.there:
          bad.append(Damage(None, f'{name}/zarr.json', str(e.__cause__)[:200]))
    yield bad
    numbers: Collection[int] = dict.fromkeys(self.there)
    if 'sites' in self.manifest:
      numbers = range(self.shards)
    # The next shard is being read while this one is looked at.
    following = None
    for shard in numbers:
      started = following or self._start(shard, arrays)
      following = None
      if shard + 1 in numbers:
        following = self._start(shard + 1, arrays)
      yield list(self._look(shard, *started))

  def _start(self, shard: int, arrays: dict[str, ts.TensorStore]):
    start = shard * self.manifest['shard_rows']
    stop = min(start + self.manifest['shard_rows'], self.manifest['rows'])
    return self._kv.read(shards_lib.shard_key(RECORDS, shard)), {
      name: array[start:stop].read() for name, array in arrays.items()
    }

  def _look(self, shard, record, rows) -> Iterator[Damage]:
    key = shards_lib.shard_key(RECORDS, shard)
    if shard not in self._found[RECORDS]:
      yield Damage(shard, key, 'is missing')
      return
    try:
      record = shards_lib.arrived_record(
        record, self.path, self.manifest['content_hash'], shard
      )
    except shards_lib.Damaged as e:
      yield Damage(shard, key, str(e))
      return
    for name, read in rows.items():
      key = shards_lib.shard_key(name, shard)
      try:
        values = shards_lib.arrived(read, f'{self.path}/{key}')
        shards_lib.check_rows(
          record, name, values, chunk_rows=self.manifest['chunk_rows']
        )
      except shards_lib.Damaged as e:
        yield Damage(shard, key, str(e))

  def repair(self, bad: Iterable[Damage]) -> None:
    """Deletes what is bad, so that harvest writes exactly that again."""
    manifest = {k: v for k, v in self.manifest.items() if k != 'sites'}
    layout.write_manifest(self.path, manifest)  # Unfinished, before all else.
    for damage in bad:
      keys = [damage.key]
      if damage.shard is not None:
        keys.insert(0, shards_lib.shard_key(RECORDS, damage.shard))
      for key in keys:
        with layout.accessing(f'{self.path}/{key}', 'delete'):
          self._kv.write(key, None).result()


def missing_shards(
  path: str,
  header: Mapping[str, Any],
  kv: ts.KvStore,
  arrays: Mapping[str, ts.TensorStore],
) -> np.ndarray:
  """Bool `[shards]`: not there, or not as it was written.

  Of a shard that is there only the first chunk of each array is read, which
  tells lost, truncated and foreign files; `Verifier` reads all.

  Args:
    path: of the store.
    header: of its manifest.
    kv: its files.
    arrays: its arrays, by name.

  Raises:
    UserError: all shards are of another store.
  """
  rows, shard_rows = header['rows'], header['shard_rows']
  missing = np.ones(-(-rows // shard_rows), bool)
  found = shards_lib.listed(kv, arrays)
  there = sorted(set.intersection(*found.values()) & set(range(len(missing))))
  foreign = 0

  def start(shard):
    first = shard * shard_rows
    last = min(first + header['chunk_rows'], rows)
    return kv.read(shards_lib.shard_key(RECORDS, shard)), {
      name: array[first:last].read() for name, array in arrays.items()
    }

  for i in range(0, len(there), _AT_ONCE):
    for shard, (record, chunks) in [
      (s, start(s)) for s in there[i:][:_AT_ONCE]
    ]:
      try:
        record = shards_lib.arrived_record(
          record, path, header['content_hash'], shard
        )
        for name, read in chunks.items():
          values = shards_lib.arrived(read, f'{path}/{name}')
          shards_lib.check_rows(
            record, name, values, chunk_rows=header['chunk_rows']
          )
        missing[shard] = False
      except shards_lib.Foreign:
        foreign += 1
      except shards_lib.Damaged:
        pass  # Missing, then.
  if foreign == len(there) > 1:
    raise UserError(
      f'--store: the manifest at {path} is of this harvest, but every shard '
      'there is of another store; give another folder, or delete them with '
      f'`python -m gsae_jax.store verify {path} --repair`'
    )
  return missing
