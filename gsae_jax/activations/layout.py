"""Where things are in a store, and how they are opened.

`docs/store_format.md` is the norm. All I/O goes through TensorStore, so that a
path may be local, gs:// or s3://. This module never imports jax.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from gsae_jax import paths
from gsae_jax.errors import UserError

SCHEMA = 4
ROW_ARRAYS = {
  'token_ids': 'int32',
  'positions': 'int32',
  'context_ids': 'int32',
  'document_ids': 'uint64',
  'special': 'bool',
}
MANIFEST = 'manifest.json'
_REQUIRED = {
  'identity', 'content_hash', 'rows', 'shard_rows', 'chunk_rows', 'dtype',
  'widths', 'encodings', 'provenance',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Encoding:
  """How rows are stored: `(x - mean) / scale`, cast to the store's dtype.

  Attributes:
    mean_D: float32, removed before the cast so that bfloat16 spends its bits on
      what differs between rows.
    scale: float32, a power of two, so that it costs no bits.
  """

  mean_D: np.ndarray
  scale: np.float32

  def decode(self, stored: Any, dtype: Any = np.float32) -> Any:
    """Returns the activations of rows `[N, D]`, NumPy's or JAX's."""
    mean_1D = self.mean_D.astype(dtype)[None]
    return stored.astype(dtype) * dtype(self.scale) + mean_1D


def kvstore_spec(path: str, name: str = '') -> dict[str, Any]:
  """TensorStore's spec for a folder, local or on object storage.

  Raises:
    UserError: it is none of those.
  """
  scheme, place = paths.split(path)
  if scheme:
    bucket, _, key = place.partition('/')
    if scheme not in ('gs', 's3') or not bucket:
      raise UserError(
        f'--store: {path} is not a place; give a folder, gs://BUCKET/PATH or '
        's3://BUCKET/PATH'
      )
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
  if not path:
    raise UserError('--store is empty; give a folder, gs:// or s3://')
  folder = os.path.join(os.path.abspath(os.path.expanduser(path)), name)
  return {'driver': 'file', 'path': folder.rstrip('/') + '/'}


def open_kvstore(path: str) -> ts.KvStore:
  """The files of a store by name.

  Raises:
    UserError: the place cannot be opened.
  """
  with accessing(path, 'open'):
    return ts.KvStore.open(kvstore_spec(path)).result()


def array_specs(
  path: str, header: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
  """TensorStore's spec of every array of a store, by name.

  Args:
    path: of the store.
    header: of its manifest: `rows`, `shard_rows`, `chunk_rows`, `dtype`, and
      `widths` by site.
  """
  shapes: dict[str, tuple[list[int], str]] = {
    name: ([], kind) for name, kind in ROW_ARRAYS.items()
  }
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


def open_array(
  spec: dict[str, Any], context: ts.Context | None = None
) -> ts.TensorStore:
  """Opens what is there for reading, if it is what `spec` says.

  Raises:
    UserError: it is not, or there is nothing.
  """
  context = context or reading_context(0)
  # A lost shard must not read as zeros.
  spec = spec | {'fill_missing_data_reads': False}
  try:
    return ts.open(spec, open=True, read=True, context=context).result()
  except ValueError as e:
    raise UserError(
      f'--store: {spec["kvstore"]["path"]} is not a readable array of this '
      f'store ({reason(e)}); run the same gsae_jax.harvest command again'
    ) from e


def reading_context(cache_bytes: int) -> ts.Context:
  """What arrays share that are opened with it."""
  return ts.Context(
    {
      'cache_pool': {'total_bytes_limit': cache_bytes},
      'file_io_concurrency': {'limit': 16},
    }
  )


@contextlib.contextmanager
def accessing(path: str, doing: str) -> Iterator[None]:
  """Turns TensorStore's errors into a line: "cannot write /a/b: why"."""
  try:
    yield
  except UserError:
    raise
  except (ValueError, OSError) as e:
    raise UserError(f'--store: cannot {doing} {path}: {reason(e)}') from e


def is_damage(error: BaseException | None) -> bool:
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


def sha256_of(value: Any) -> str:
  """SHA-256 of a value's canonical JSON, in hexadecimal."""
  text = json.dumps(value, sort_keys=True, separators=(',', ':'))
  return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: str) -> dict[str, Any] | None:
  """The manifest, or None where there is none.

  Raises:
    UserError: it cannot be read, is damaged, or of an unknown schema.
  """
  kv = open_kvstore(path)
  with accessing(path, 'read'):
    value = kv.read(MANIFEST).result()
  if value.state == 'missing':
    return None
  where = f'--store: {path}/{MANIFEST}'
  remedy = (
    'put the original back, or delete it and run the same gsae_jax.harvest '
    'again, which keeps what fits'
  )
  try:
    manifest = json.loads(value.value)
  except (ValueError, RecursionError) as e:
    raise UserError(f'{where} is not JSON ({e}); {remedy}') from e
  if not isinstance(manifest, dict) or 'schema' not in manifest:
    raise UserError(f'{where} is not a manifest; {remedy}')
  if manifest['schema'] != SCHEMA:
    raise UserError(
      f'--store: {path} has schema {manifest["schema"]}, and this version '
      f'reads {SCHEMA}; harvest again or install the version that wrote it'
    )
  if manifest.pop('digest', None) != sha256_of(manifest):
    raise UserError(
      f'{where} was changed after it was written (its digest does not fit); '
      f'{remedy}'
    )
  if lacking := _REQUIRED - manifest.keys():
    raise UserError(f'{where} lacks {min(lacking)!r}; {remedy}')
  if content_hash(manifest) != manifest['content_hash']:
    raise UserError(
      f'{where}: its content hash is not that of its content; {remedy}'
    )
  return manifest


def content_hash(header: Mapping[str, Any]) -> str:
  """What a store is: its identity, and how its values are to be read."""
  return sha256_of([header['identity'], header['encodings']])


def write_manifest(
  path: str, manifest: dict[str, Any], *, over: bytes | None = None
) -> bool:
  """Writes the manifest; whether it is there then.

  Args:
    path: of the store.
    manifest: what to write.
    over: generation of the only manifest that may be replaced; None is any.
  """
  kv = open_kvstore(path)
  manifest = manifest | {'digest': sha256_of(manifest)}
  raw = json.dumps(manifest, indent=1).encode()
  with accessing(path, 'write'):
    kv.write(MANIFEST, raw, if_equal=over).result()
    return kv.read(MANIFEST).result().value == raw


def encodings_of(manifest: dict[str, Any]) -> dict[str, Encoding | None]:
  """How each site is stored."""
  return {
    site: e
    and Encoding(np.array(e['mean'], np.float32), np.float32(e['scale']))
    for site, e in manifest['encodings'].items()
  }
