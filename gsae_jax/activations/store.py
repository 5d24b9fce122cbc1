"""The activation store's format, and the door through which it is read.

    manifest.json                 schema, identity, content hash, statistics
    token_ids, positions, special `[N]`: where each row comes from
    <site>/activations            `[N, D]` zarr3; shard = unit of writing and
                                  of resuming, inner chunk = unit of reading
    <site>/shard_sums             `[shards, D]` float64 sums of the rows
    <site>/shard_squares          `[shards]` float64 sums of squared norms

All I/O goes through TensorStore, so that a path may be local, gs:// or s3://.
This module never imports jax: a store is data, and looking at it needs no
accelerator.
"""

import dataclasses
import difflib
import hashlib
import json
import os
from typing import Any

import numpy as np
import tensorstore as ts

from gsae_jax.errors import UserError

SCHEMA = 1
ROW_ARRAYS = {'token_ids': 'int32', 'positions': 'int32', 'special': 'bool'}


@dataclasses.dataclass(frozen=True)
class Site:
  """One site's statistics, over all rows as stored.

  Attributes:
    width: D.
    mean_D: float64 mean of the rows.
    mean_squared_norm: mean of `||x||^2`.
  """

  width: int
  mean_D: np.ndarray
  mean_squared_norm: float


@dataclasses.dataclass(frozen=True)
class Store:
  """A finished store.

  Attributes:
    path: where it is.
    identity: everything that determines its content.
    provenance: where that came from: `lm_path`, `lm_revision`, `text_path`.
    content_hash: SHA-256 of the identity.
    rows: N.
    chunk_rows: rows of an inner chunk.
    sites: statistics by site.
  """

  path: str
  identity: dict[str, Any]
  provenance: dict[str, Any]
  content_hash: str
  rows: int
  chunk_rows: int
  sites: dict[str, Site]

  def array(self, name: str, *, cache_bytes: int = 0) -> ts.TensorStore:
    """Opens `<site>/activations` or one of the row arrays for reading."""
    context = ts.Context(
      {
        'cache_pool': {'total_bytes_limit': cache_bytes},
        'file_io_concurrency': {'limit': 16},
      }
    )
    spec = {
      'driver': 'zarr3',
      'kvstore': kvstore_spec(self.path, name),
      'fill_missing_data_reads': False,  # A lost shard must not read as zeros.
    }
    try:
      return ts.open(spec, open=True, read=True, context=context).result()
    except ValueError as e:
      raise UserError(
        f'--store: {self.path} has no readable {name}; run the same '
        'gsae_jax.harvest command again'
      ) from e


def kvstore_spec(path: str, name: str = '') -> dict[str, Any]:
  """TensorStore's spec for a folder, local or on object storage."""
  for scheme in ('gs', 's3'):
    if path.startswith(f'{scheme}://'):
      bucket, _, key = path[len(scheme) + 3 :].partition('/')
      driver = {'gs': 'gcs', 's3': 's3'}[scheme]
      prefix = '/'.join(p for p in (key.strip('/'), name) if p)
      return {'driver': driver, 'bucket': bucket, 'path': prefix + '/'}
  folder = os.path.join(os.path.abspath(os.path.expanduser(path)), name)
  return {'driver': 'file', 'path': folder.rstrip('/') + '/'}


def array_spec(
  path: str, name: str, *, shape, dtype: str, shard: int, chunk: int
) -> dict[str, Any]:
  """The spec of one array; `shard` and `chunk` are rows."""
  rest = list(shape[1:])
  part = lambda codec, **config: {'name': codec, 'configuration': config}
  inner = [part('bytes', endian='little'), {'name': 'crc32c'}]
  if dtype == 'bool':  # One byte has no endianness.
    inner[0] = {'name': 'bytes'}
  index = [part('bytes', endian='little'), {'name': 'crc32c'}]
  return {
    'driver': 'zarr3',
    'kvstore': kvstore_spec(path, name),
    'store_data_equal_to_fill_value': True,  # An all-zero shard is a file too.
    'metadata': {
      'shape': list(shape),
      'data_type': dtype,
      'chunk_grid': part('regular', chunk_shape=[shard, *rest]),
      'codecs': [
        part(
          'sharding_indexed',
          chunk_shape=[chunk, *rest],
          codecs=inner,
          index_codecs=index,
        )
      ],
    },
  }


def content_hash(identity: dict[str, Any]) -> str:
  text = json.dumps(identity, sort_keys=True, separators=(',', ':'))
  return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: str) -> dict[str, Any] | None:
  """The manifest, or None where there is none."""
  kv = ts.KvStore.open(kvstore_spec(path)).result()
  value = kv.read('manifest.json').result()
  if value.state == 'missing':
    return None
  try:
    manifest = json.loads(value.value)
  except ValueError as e:
    raise UserError(f'--store: {path}/manifest.json is not JSON ({e})') from e
  if not isinstance(manifest, dict):
    raise UserError(f'--store: {path}/manifest.json is not a manifest')
  return manifest


def write_manifest(path: str, manifest: dict[str, Any]) -> None:
  kv = ts.KvStore.open(kvstore_spec(path)).result()
  kv.write('manifest.json', json.dumps(manifest, indent=1).encode()).result()


def check_schema(path: str, manifest: dict[str, Any]) -> None:
  if manifest.get('schema') != SCHEMA:
    raise UserError(
      f'--store: {path} has schema {manifest.get("schema")}, and this version '
      f'reads {SCHEMA}; harvest again or install the version that wrote it'
    )


def differences(have: Any, want: Any, prefix: str = '') -> list[str]:
  """Names, with both values, of the leaves in which two mappings differ."""
  if isinstance(have, dict) and isinstance(want, dict):
    return [
      line
      for key in sorted({*have, *want})
      for line in differences(have.get(key), want.get(key), f'{prefix}{key}.')
    ]
  if have == want:
    return []
  return [f'{prefix.rstrip(".")} is {have!r} there and {want!r} here']


def open_store(path: str) -> Store:
  """Opens a finished store.

  Raises:
    UserError: there is none, it is unfinished, or its schema is unknown.
  """
  manifest = read_manifest(path)
  if manifest is None:
    raise UserError(
      f'--store: no activation store at {path}; run gsae_jax.harvest first'
    )
  check_schema(path, manifest)
  if 'sites' not in manifest:
    raise UserError(
      f'--store: the harvest at {path} is unfinished; run the same '
      'gsae_jax.harvest command again, and it will go on'
    )
  try:
    return Store(
      path=path,
      identity=manifest['identity'],
      provenance=manifest['provenance'],
      content_hash=manifest['content_hash'],
      rows=manifest['rows'],
      chunk_rows=manifest['chunk_rows'],
      sites={
        name: Site(s['width'], np.array(s['mean']), s['mean_squared_norm'])
        for name, s in manifest['sites'].items()
      },
    )
  except KeyError as e:
    raise UserError(
      f'--store: {path}/manifest.json lacks {e}; harvest into another folder'
    ) from e


def check_site(store: Store, site: str, member: str) -> None:
  if site not in store.sites:
    near = difflib.get_close_matches(site, store.sites, 1)
    hint = f'; did you mean {near[0]!r}?' if near else ''
    raise UserError(
      f'saes: member {member!r} trains on {site!r}, and the store at '
      f'{store.path} holds {", ".join(store.sites)}{hint}'
    )
