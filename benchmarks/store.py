r"""Activation store: speed against the disk's own, memory, and what training eats.

  python benchmarks/store.py --folder=DIR        a few minutes, 3 GB in DIR

Everything that is compared is measured in the same run, by turns; figures are
medians. The page cache is dropped before each read, which takes root.
"""

import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
from absl import app, flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import quickstart
from gsae_jax import config as config_lib
from gsae_jax.activations.loader import Loader
from gsae_jax.activations.store import open_store
from gsae_jax.activations.writer import StoreWriter
from gsae_jax.mesh import make_mesh
from gsae_jax.training.members import build_members

_FOLDER = flags.DEFINE_string(
  'folder', None, 'On the disk; gsae_bench is made in it, and deleted.'
)
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Measurements of each thing.')
_PART = flags.DEFINE_string('part', None, 'One measurement; for subprocesses.')

SITE = 'mlp_out.0'
# Rows, width, dtype, rows of a shard, of a chunk, of a buffer; batch; mixed.
SHAPES = {
  'quickstart': (1_000_000, 128, 'float32', 16_384, 64, 131_072, 512, 8_192),
  'gemma_2_2b': (262_144, 2304, 'bfloat16', 8_192, 64, 65_536, 4096, 16_384),
}
MB = 2**20


def place(name: str) -> str:
  return os.path.join(_FOLDER.value, 'gsae_bench', name)


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


def read(path: str, shape: str, seconds: float = 4.0, **changes) -> float:
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


def step_rate(path: str, seconds: float = 4.0) -> float:
  """Rows per second that the quickstart's ten SAEs train on, loading apart."""
  config = config_lib.parse(quickstart.get_config())
  mesh = make_mesh(-1, 1)
  store = open_store(path)
  run = build_members(config.saes, config.train, store, mesh, 0)
  loader = open_loader(path, 'quickstart')
  batch = next(loader.batches(NamedSharding(mesh, P('data')), start=0))[SITE]

  def steps(n):
    for _ in range(n):
      for m in run:
        m.state, metrics = m.step(m.state, batch, m.hyper)
      jax.block_until_ready(metrics)

  steps(3)  # Compiles.
  begun, count = time.perf_counter(), 0
  while time.perf_counter() - begun < seconds:
    steps(10)
    count += 10
  return count * config.train.batch_size / (time.perf_counter() - begun)


def resident(which: str) -> int:
  """Bytes of this process's memory: now, or at its peak."""
  with open('/proc/self/status') as f:
    (line,) = (x for x in f if x.startswith(which))
  return int(line.split()[1]) * 1024


def peak(part: str, shape: str) -> None:
  """Prints by how much a writer's or a loader's run raised the peak memory."""
  path = place(shape)
  values = rows_of(shape) if part == 'write' else None
  ctypes.CDLL('libc.so.6').malloc_trim(0)
  jax.block_until_ready(jax.numpy.zeros(1))
  before = resident('VmRSS')
  with open('/proc/self/clear_refs', 'w') as f:
    f.write('5')  # Forgets the peak so far.
  if part == 'write':
    with open_writer(path + '_peak', shape) as writer:
      for buffer in writer.missing_buffers()[:-1]:
        # A buffer of its own each time, as the language model makes them.
        writer.put(buffer, {k: v.copy() for k, v in values.items()})
      writer.flush()
    shutil.rmtree(path + '_peak')
  else:
    mixed = SHAPES[shape][-1] if part == 'chunk' else 8 * SHAPES[shape][3]
    read(path, shape, unit=part, shuffle_rows=mixed)
  print(json.dumps(resident('VmHWM') - before))


def peak_of(part: str, shape: str) -> float:
  command = [sys.executable, __file__, f'--folder={_FOLDER.value}']
  out = subprocess.run(
    [*command, f'--part={part}:{shape}'],
    env={k: v for k, v in os.environ.items() if not k.startswith('MALLOC')},
    check=True,
    stdout=subprocess.PIPE,
  ).stdout
  return json.loads(out.splitlines()[-1])


def bench(shape: str) -> None:
  rows, width, dtype, shard, chunk, buffer, batch, mixed = SHAPES[shape]
  path = place(shape)
  raw = place('raw')
  row = width * (4 if dtype == 'float32' else 2)
  shards = {'unit': 'shard', 'shuffle_rows': 8 * shard}
  found = {}

  def note(name, value):
    found.setdefault(name, []).append(value)

  cold = False
  for _ in range(_ROUNDS.value):
    os.sync()
    note('raw write', raw_write(raw, rows * row))
    note('store write', write(path, shape))
    for name, measure in (
      ('raw read', lambda: raw_read(raw)),
      ('chunks read', lambda: row * read(path, shape)),
      ('shards read', lambda: row * read(path, shape, **shards)),
    ):
      cold = drop_caches()
      note(name, measure())
  medians = {k: statistics.median(v) for k, v in found.items()}
  print(
    f'\n{shape}: {rows:,} x {width} {dtype}, shards of {shard:,}, chunks of '
    f'{chunk}, batches of {batch:,}, {mixed:,} rows mixed'
    f'{"" if cold else " (the page cache could not be dropped)"}'
  )
  for name, value in medians.items():
    base = medians[f'raw {name.split()[-1]}']
    print(
      f'  {name:14}{value / 1e9:8.2f} GB/s{value / row:14,.0f} rows/s'
      f'{value / base:8.2f} of raw'
    )
  memory = {
    # Buffers: one being made, one being written. Rounds: in use, being read.
    'write': (peak_of('write', shape), 2 * buffer * row),
    'chunk': (peak_of('chunk', shape), 2 * mixed * row),
    'shard': (peak_of('shard', shape), 2 * 8 * shard * row),
  }
  for name, (got, bound) in memory.items():
    print(
      f'  peak memory, {name}: {got / MB:.0f} MiB; its buffers or rounds are '
      f'{bound / MB:.0f} MiB'
    )
  os.remove(raw)


def main(unused):
  del unused
  os.makedirs(place(''), exist_ok=True)
  if _PART.value:
    return peak(*_PART.value.split(':'))
  for shape in SHAPES:
    bench(shape)
  path = place('quickstart')
  loads, steps = [], []
  for _ in range(_ROUNDS.value):
    loads.append(read(path, 'quickstart'))
    steps.append(step_rate(path))
  load, step = statistics.median(loads), statistics.median(steps)
  print(
    f'\nquickstart: the loader gives {load:,.0f} rows/s, training takes '
    f'{step:,.0f}: {load / step:.1f} times as many'
  )
  shutil.rmtree(place(''))


if __name__ == '__main__':
  flags.mark_flag_as_required('folder')
  app.run(main)
