"""Stores of the sizes that configs have, and the disk's own speed beside them."""

import os
import shutil
import subprocess
import time

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.activations.loader import Loader
from gsae_jax.activations.store import open_store
from gsae_jax.activations.writer import StoreWriter
from gsae_jax.mesh import make_mesh

SITE = 'mlp_out.0'
# Rows, width, dtype, rows of a shard, of a chunk, of a buffer; batch; mixed.
SHAPES = {
  'quickstart': (1_000_000, 128, 'float32', 16_384, 64, 131_072, 512, 8_192),
  'gemma_2_2b': (262_144, 2304, 'bfloat16', 8_192, 64, 65_536, 4096, 16_384),
}
MB = 2**20


def drop_caches() -> bool:
  """Whether the page cache could be emptied."""
  try:
    subprocess.run(['sync'], check=True)
    with open('/proc/sys/vm/drop_caches', 'w') as f:
      f.write('3')
  except OSError:
    return False
  return True


def rows_of(shape: str) -> dict[str, np.ndarray]:
  """One buffer's worth."""
  _, width, dtype, _, _, buffer, *_ = SHAPES[shape]
  kind = np.float32 if dtype == 'float32' else ml_dtypes.bfloat16
  x = np.random.default_rng(0).normal(size=(buffer, width)).astype(np.float32)
  numbers = np.arange(buffer)
  return {
    'token_ids': numbers.astype(np.int32),
    'positions': numbers.astype(np.int32),
    'context_ids': numbers.astype(np.int32),
    'document_ids': numbers.astype(np.uint64),
    'special': numbers < 0,
    SITE: x.astype(kind),
  }


def open_writer(path: str, shape: str) -> StoreWriter:
  rows, width, dtype, shard, chunk, buffer, *_ = SHAPES[shape]
  return StoreWriter(
    path,
    identity={},
    provenance={},
    widths={SITE: width},
    rows=rows,
    shard_rows=shard,
    chunk_rows=chunk,
    buffer_rows=buffer,
    dtype=dtype,
    make_encodings=lambda: {SITE: None},
  )


def write(path: str, shape: str) -> float:
  """Bytes of activations per second, until they are safe on the disk."""
  rows, width, dtype, *_ = SHAPES[shape]
  values = rows_of(shape)
  shutil.rmtree(path, ignore_errors=True)
  begun = time.perf_counter()
  with open_writer(path, shape) as writer:
    for buffer in writer.missing_buffers():
      left = rows - buffer * len(values[SITE])
      writer.put(buffer, {k: v[:left] for k, v in values.items()})
    writer.flush()
    writer.finish()
  size = rows * width * values[SITE].dtype.itemsize
  return size / (time.perf_counter() - begun)


def open_loader(path: str, shape: str, **changes) -> Loader:
  *_, batch, mixed = SHAPES[shape]
  values = {'unit': 'chunk', 'shuffle_rows': mixed} | changes
  return Loader(open_store(path), (SITE,), batch_size=batch, seed=0, **values)


def read(path: str, shape: str, seconds: float, **changes) -> float:
  """Rows per second as device arrays."""
  loader = open_loader(path, shape, **changes)
  batches = loader.batches(NamedSharding(make_mesh(-1, 1), P('data')), start=0)
  jax.block_until_ready(next(batches))  # Behind the first round.
  begun, count = time.perf_counter(), 0
  while time.perf_counter() - begun < seconds:
    jax.block_until_ready(next(batches))
    count += loader.batch_size
  return count / (time.perf_counter() - begun)


def raw_write(path: str, size: int) -> float:
  block = np.random.default_rng(0).bytes(16 * MB)
  begun = time.perf_counter()
  with open(path, 'wb', buffering=0) as f:
    for _ in range(size // len(block)):
      f.write(block)
    os.fsync(f.fileno())
  return size // len(block) * len(block) / (time.perf_counter() - begun)


def raw_read(path: str) -> float:
  block = bytearray(16 * MB)
  begun, size = time.perf_counter(), 0
  with open(path, 'rb', buffering=0) as f:
    while n := f.readinto(block):
      size += n
  return size / (time.perf_counter() - begun)
