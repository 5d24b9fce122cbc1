r"""Activation store: speed against the disk's own, memory, and what training eats.

  python -m benchmarks.loader --folder=DIR        a few minutes, 3 GB in DIR

Everything that is compared is measured in the same run, by turns; figures are
medians. The page cache is dropped before each read, which takes root. Memory is
that of a process which does one thing, above what it held before.
"""

import ctypes
import functools
import json
import os
import shutil
import subprocess
import sys
import time

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import record, stores
from benchmarks.stores import MB, SHAPES
from experiments import quickstart
from gsae_jax import config as config_lib
from gsae_jax.activations.store import open_store
from gsae_jax.mesh import make_mesh
from gsae_jax.training.groups import make_groups
from gsae_jax.training.run import Run


def parse():
  flags = record.parser(__doc__, rounds=5)
  flags.add_argument(
    '--folder',
    required=True,
    help='On the disk; gsae_bench is made in it, and deleted.',
  )
  flags.add_argument('--seconds', type=float, default=4.0, help='Of a read.')
  flags.add_argument(
    '--shapes', default=','.join(SHAPES), help='Some of them, by name.'
  )
  flags.add_argument(
    '--part', help='A measurement of memory; for subprocesses.'
  )
  args = flags.parse_args()
  args.folder = os.path.join(args.folder, 'gsae_bench')
  args.shapes = args.shapes.split(',')
  for shape in args.shapes:
    if shape not in SHAPES:
      sys.exit(f'error: --shapes: there is no {shape!r}')
  return args


def step_rate(path: str, seconds: float) -> float:
  """Rows per second that the quickstart's ten SAEs train on, loading apart."""
  config = config_lib.parse(quickstart.get_config())
  mesh = make_mesh(-1, 1)
  store = open_store(path)
  groups = make_groups(config.saes, config.train, store, mesh, config.seed)
  run = Run(groups, store)
  run.start(lambda member: {})
  loader = stores.open_loader(path, 'quickstart')
  batch = next(loader.batches(NamedSharding(mesh, P('data')), start=0))

  def steps(n):
    for _ in range(n):
      metrics = run.step(batch)
    jax.block_until_ready(metrics)

  steps(3)  # Compiles.
  begun, count = time.perf_counter(), 0
  while time.perf_counter() - begun < seconds:
    steps(10)
    count += 10
  return count * config.train.batch_size / (time.perf_counter() - begun)


def peak(args, part: str, shape: str) -> None:
  """Prints by how much a writer's or a loader's run raised the peak memory."""
  path = os.path.join(args.folder, shape)
  values = stores.rows_of(shape) if part == 'write' else None
  ctypes.CDLL('libc.so.6').malloc_trim(0)
  jax.block_until_ready(jax.numpy.zeros(1))
  before = record.memory('VmRSS')
  with open('/proc/self/clear_refs', 'w') as f:
    f.write('5')  # Forgets the peak so far.
  if part == 'write':
    with stores.open_writer(path + '_peak', shape) as writer:
      for buffer in writer.missing_buffers()[:-1]:
        # A buffer of its own each time, as the language model makes them.
        writer.put(buffer, {k: v.copy() for k, v in values.items()})
      writer.flush()
    shutil.rmtree(path + '_peak')
  else:
    mixed = SHAPES[shape][-1] if part == 'chunk' else 8 * SHAPES[shape][3]
    stores.read(path, shape, args.seconds, unit=part, shuffle_rows=mixed)
  print(json.dumps(record.memory('VmHWM') - before))


def peak_of(args, part: str, shape: str) -> float:
  command = [sys.executable, '-m', 'benchmarks.loader']
  command += [
    f'--folder={os.path.dirname(args.folder)}',
    f'--seconds={args.seconds}',
    f'--part={part}:{shape}',
  ]
  out = subprocess.run(
    command,
    cwd=record.ROOT,
    env={k: v for k, v in os.environ.items() if not k.startswith('MALLOC')},
    check=True,
    stdout=subprocess.PIPE,
  ).stdout
  return json.loads(out.splitlines()[-1])


def measure(args, shape: str) -> tuple[list[dict], bool]:
  """A row a way of writing or reading; whether reads were not of the cache."""
  rows, width, dtype, shard, *_ = SHAPES[shape]
  path, raw = (os.path.join(args.folder, name) for name in (shape, 'raw'))
  row = width * (4 if dtype == 'float32' else 2)
  chunks = functools.partial(stores.read, path, shape, args.seconds)
  shards = functools.partial(chunks, unit='shard', shuffle_rows=8 * shard)
  found, cold = {}, False
  for _ in range(args.rounds):
    os.sync()
    for name, run in (
      ('raw write', lambda: stores.raw_write(raw, rows * row)),
      ('store write', lambda: stores.write(path, shape)),
      ('raw read', lambda: stores.raw_read(raw)),
      ('chunks read', lambda: row * chunks()),
      ('shards read', lambda: row * shards()),
    ):
      cold = stores.drop_caches()
      found.setdefault(name, []).append(run())
  os.remove(raw)
  lines = []
  for name, speeds in found.items():
    base = found[f'raw {name.split()[-1]}']
    shares = (a / b for a, b in zip(speeds, base, strict=True))
    lines.append(
      {
        'name': name,
        'speed': record.spread((s / 1e9 for s in speeds), 'GB/s'),
        'rows': record.spread((s / row for s in speeds), 'rows/s'),
        'of_raw': record.spread(shares, 'times'),
      }
    )
  return lines, cold


def memory(args, shape: str) -> list[dict]:
  """By how much each raises the peak, and what its buffers or rounds hold."""
  _, width, dtype, shard, _, buffer, _, mixed = SHAPES[shape]
  row = width * (4 if dtype == 'float32' else 2)
  # Buffers: one being made, one being written. Rounds: in use, being read.
  held = {'write': buffer, 'chunk': mixed, 'shard': 8 * shard}
  return [
    {
      'name': f'memory, {part}',
      'peak_memory': {'value': peak_of(args, part, shape) / MB, 'unit': 'MiB'},
      'two_buffers': {'value': 2 * rows * row / MB, 'unit': 'MiB'},
    }
    for part, rows in held.items()
  ]


def feed(args) -> list[dict]:
  """What the loader gives the quickstart, and what its training takes."""
  path = os.path.join(args.folder, 'quickstart')
  loads, steps = [], []
  for _ in range(args.rounds):
    loads.append(stores.read(path, 'quickstart', args.seconds))
    steps.append(step_rate(path, args.seconds))
  more = record.spread(
    (a / b for a, b in zip(loads, steps, strict=True)), 'times'
  )
  return [
    {
      'name': 'loader gives',
      'rows': record.spread(loads, 'rows/s'),
      'of_training': more,
    },
    {'name': 'training takes', 'rows': record.spread(steps, 'rows/s')},
  ]


def show(rows: list[dict]) -> str:
  def cells(row):
    size = lambda key: f'{row[key]["value"]:,.0f}' if key in row else ''
    return [
      row['name'],
      record.show(row.get('speed'), '.2f'),
      record.show(row.get('rows'), ',.0f'),
      record.show(row.get('of_raw'), '.2f'),
      record.show(row.get('of_training'), ',.1f'),
      size('peak_memory'),
      size('two_buffers'),
    ]

  heads = ['', 'GB/s', 'rows/s', 'of raw', 'of training', 'peak MiB']
  return record.table([*heads, 'two buffers or rounds, MiB'], map(cells, rows))


def main():
  args = parse()
  os.makedirs(args.folder, exist_ok=True)
  if args.part:
    return peak(args, *args.part.split(':'))
  for shape in args.shapes:
    rows, cold = measure(args, shape)
    rows += memory(args, shape)
    if shape == 'quickstart':
      rows += feed(args)
    names = (
      'rows',
      'width',
      'dtype',
      'shard',
      'chunk',
      'buffer',
      'batch',
      'mixed',
    )
    sizes = dict(zip(names, SHAPES[shape], strict=True))
    record.append(
      args.results,
      'loader',
      settings={'shape': shape, **sizes, 'rounds': args.rounds, 'cold': cold},
      rows=rows,
    )
    warm = '' if cold else ', the page cache could not be dropped'
    told = ', '.join(f'{k} {v}' for k, v in sizes.items())
    print(f'\n{shape}: {told}{warm}\n\n{show(rows)}', flush=True)
  shutil.rmtree(args.folder)


if __name__ == '__main__':
  main()
