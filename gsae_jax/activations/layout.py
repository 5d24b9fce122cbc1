"""Where things are in a store, and how they are opened.

`docs/store_format.md` is the norm. All I/O goes through TensorStore, so that a
path may be local, gs:// or s3://. This module never imports jax.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import tensorstore as ts

from gsae_jax.errors import UserError

SCHEMA = 2
ROW_ARRAYS = {
  'token_ids': 'int32',
  'positions': 'int32',
  'context_ids': 'int32',
  'document_ids': 'uint64',
  'special': 'bool',
}
MANIFEST = 'manifest.json'


def kvstore_spec(path: str, name: str = '') -> dict[str, Any]:
  """TensorStore's spec for a folder, local or on object storage.

  Raises:
    UserError: the scheme is not one of those.
  """
  scheme, _, place = path.partition('://')
  if place:
    if scheme not in ('gs', 's3'):
      raise UserError(
        f'--store: {path}: {scheme}:// is not known; give a folder, gs:// or '
        's3://'
      )
    bucket, _, key = place.partition('/')
    prefix = '/'.join(p for p in (key.strip('/'), name) if p)
    spec = {
      'driver': {'gs': 'gcs', 's3': 's3'}[scheme],
      'bucket': bucket,
      'path': f'{prefix}/' if prefix else '',
    }
    endpoint = os.environ.get('GSAE_S3_ENDPOINT')
    if scheme == 's3' and endpoint:  # TensorStore reads none by itself.
      region = os.environ.get('AWS_REGION', 'us-east-1')
      spec |= {'endpoint': endpoint, 'aws_region': region}
    return spec
  folder = os.path.join(os.path.abspath(os.path.expanduser(path)), name)
  return {'driver': 'file', 'path': folder.rstrip('/') + '/'}


def open_kvstore(path: str) -> ts.KvStore:
  """The files of a store by name.

  Raises:
    UserError: the place cannot be opened.
  """
  try:
    return ts.KvStore.open(kvstore_spec(path)).result()
  except (ValueError, OSError) as e:
    raise UserError(f'--store: cannot open {path}: {reason(e)}') from e


def array_specs(
  path: str, header: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
  """TensorStore's spec of every array of a store, by name.

  Args:
    path: of the store.
    header: of its manifest: `rows`, `shard_rows`, `chunk_rows`, `dtype`, and
      `widths` by site.
  """
  shapes = {name: ([], kind) for name, kind in ROW_ARRAYS.items()}
  for site, width in header['widths'].items():
    shapes[f'{site}/activations'] = [width], header['dtype']
  return {
    name: _array_spec(
      path,
      name,
      shape=[header['rows'], *rest],
      dtype=kind,
      shard=header['shard_rows'],
      chunk=header['chunk_rows'],
    )
    for name, (rest, kind) in shapes.items()
  }


def _array_spec(
  path: str, name: str, *, shape, dtype: str, shard: int, chunk: int
) -> dict[str, Any]:
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


def open_array(spec: dict[str, Any], cache_bytes: int = 0) -> ts.TensorStore:
  """Opens what is there for reading, if it is what `spec` says.

  Raises:
    UserError: it is not, or there is nothing.
  """
  context = ts.Context(
    {
      'cache_pool': {'total_bytes_limit': cache_bytes},
      'file_io_concurrency': {'limit': 16},
    }
  )
  try:
    return ts.open(spec, open=True, read=True, context=context).result()
  except ValueError as e:
    raise UserError(
      f'--store: {spec["kvstore"]["path"]} is not a readable array of this '
      f'store ({reason(e)}); run the same gsae_jax.harvest command again'
    ) from e


def is_damage(error: Exception) -> bool:
  """Whether an error is about what is there, and not about reaching it."""
  return str(error).startswith(
    ('DATA_LOSS', 'NOT_FOUND', 'OUT_OF_RANGE', 'INVALID_ARGUMENT',
     'FAILED_PRECONDITION')
  )  # fmt: skip


def reason(error: Exception) -> str:
  """The first clause of TensorStore's errors, which go on to list the spec."""
  return str(error).split(' [')[0].splitlines()[0]


def row_bytes(header: Mapping[str, Any]) -> int:
  """Bytes of a row over all arrays, checksums and records apart."""
  kinds = [(kind, 1) for kind in ROW_ARRAYS.values()]
  kinds += [(header['dtype'], width) for width in header['widths'].values()]
  return sum(ts.dtype(k).numpy_dtype.itemsize * n for k, n in kinds)


def content_hash(identity: dict[str, Any]) -> str:
  """SHA-256 of a value's canonical JSON, in hexadecimal."""
  text = json.dumps(identity, sort_keys=True, separators=(',', ':'))
  return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: str) -> dict[str, Any] | None:
  """The manifest, or None where there is none.

  Raises:
    UserError: it cannot be read, is damaged, or of an unknown schema.
  """
  kv = open_kvstore(path)
  try:
    value = kv.read(MANIFEST).result()
  except (ValueError, OSError) as e:
    raise UserError(f'--store: cannot read {path}: {reason(e)}') from e
  if value.state == 'missing':
    return None
  where = f'--store: {path}/{MANIFEST}'
  try:
    manifest = json.loads(value.value)
  except ValueError as e:
    raise UserError(f'{where} is not JSON ({e})') from e
  if not isinstance(manifest, dict) or 'schema' not in manifest:
    raise UserError(f'{where} is not a manifest')
  if manifest['schema'] != SCHEMA:
    raise UserError(
      f'--store: {path} has schema {manifest["schema"]}, and this version '
      f'reads {SCHEMA}; harvest again or install the version that wrote it'
    )
  digest = manifest.pop('digest', None)
  if digest != content_hash(manifest):
    raise UserError(
      f'{where} was changed after it was written (its digest does not fit); '
      'put the original back, or delete it and run gsae_jax.harvest again'
    )
  if content_hash(manifest['identity']) != manifest['content_hash']:
    raise UserError(f'{where}: its content hash is not that of its identity')
  return manifest


def write_manifest(
  path: str, manifest: dict[str, Any], *, only_first: bool = False
) -> None:
  """Writes the manifest; with `only_first`, not over one that is there."""
  kv = open_kvstore(path)
  manifest = manifest | {'digest': content_hash(manifest)}
  raw = json.dumps(manifest, indent=1).encode()
  condition = None
  if only_first:
    there = kv.read(MANIFEST).result()
    if there.state != 'missing':
      return
    condition = there.stamp.generation
  kv.write(MANIFEST, raw, if_equal=condition).result()
