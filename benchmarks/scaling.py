r"""What bounds the train step on 1 to 256 TPU chips, predicted without a TPU.

  pip install --target LIBTPU --no-deps 'libtpu==0.0.42.*'    # what jax 0.10.2 wants
  PYTHONPATH=LIBTPU python -m benchmarks.scaling [--only=WORD] [--plot=FILE]

Compiles the dense step that gsae_jax.train runs, with the TPU's own compiler,
which says how much a chip computes, moves, sends and holds. Over what the vendor
says of a chip, that is three times; the longest is the bound. Nothing runs, and
no latency is counted. A program is half a minute to a minute on one core, with
precision='float32' three.

The batch is of --batch rows whatever the number of chips. `sae` rows train
--members SAEs on it, and count its tokens once for each.
"""

import argparse
import dataclasses
import importlib.metadata
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import record, topology
from benchmarks.roofline import (
  CHIPS,
  GB,
  PASSES,
  Chip,
  best_split,
  draw,
  links,
  predict,
  wire_bytes,
)
from experiments import quickstart
from gsae_jax import config as config_lib
from gsae_jax.sae import ARCHITECTURES
from gsae_jax.training import state as state_lib
from gsae_jax.training.members import make_recipe
from gsae_jax.training.programs import compile_step
from gsae_jax.training.step import Hyperparameters

MB, MS = 1e6, 1e-3

TOPOLOGIES = {
  'v5e': ('1x1', '2x4', '8x8', '16x16'),
  'v5p': ('1x1x1', '2x2x2', '4x4x4', '4x8x8'),
  'v6e': ('1x1', '2x4', '8x8', '16x16'),
}


@dataclasses.dataclass(frozen=True)
class Program:
  """The step of some SAEs on some chips."""

  topology: str
  sae: int
  data: int
  model: int

  @property
  def chip(self) -> Chip:
    return CHIPS[self.topology.partition(':')[0]]

  @property
  def mesh(self) -> dict[str, int]:
    return {'sae': self.sae, 'data': self.data, 'model': self.model}

  def __str__(self) -> str:
    return f'{self.topology} sae={self.sae} data={self.data} model={self.model}'


def programs(features: int, batch: int, members: int) -> list[Program]:
  """One SAE on every topology; on the largest, also not divided by rows."""
  found = []
  for generation, shapes in TOPOLOGIES.items():
    for shape in shapes:
      name = f'{generation}:{shape}'
      chips = math.prod(topology.bounds(name))
      found.append(Program(name, 1, *best_split(chips, features, batch)))
    found.append(Program(name, 1, 1, chips))
    if members > 1 and chips % members == 0:
      split = best_split(chips // members, features, batch)
      found.append(Program(name, members, *split))
  return list(dict.fromkeys(found))


def compile_program(program: Program, args) -> tuple[Mesh, jax.stages.Compiled]:
  """What gsae_jax.train compiles, for chips that are not there."""
  mesh = topology.make_mesh(
    topology.devices(program.topology), *program.mesh.values()
  )
  module = ARCHITECTURES['gated'](
    args.width, args.features, precision=args.precision, turned=True
  )
  recipe = make_recipe(config_lib.parse(quickstart.get_config()).train)
  stacked = program.sae > 1
  front = (program.sae,) if stacked else ()
  shapes = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct((*front, *a.shape), a.dtype),
    state_lib.member_shapes(module),
  )
  layout = 'stacked' if stacked else 'alone'
  state = state_lib.place(
    shapes, state_lib.shardings(mesh, shapes, layout=layout)
  )
  rows = NamedSharding(mesh, P('data', None))
  x_BD = topology.abstract((args.batch, args.width), jnp.float32, rows)
  spread = NamedSharding(mesh, P('sae') if stacked else P())
  scalar = topology.abstract(front, jnp.float32, spread)
  hyper = Hyperparameters(*[scalar] * len(Hyperparameters._fields))
  step = compile_step(module, recipe, mesh, stacked=stacked)
  return mesh, step.lower(state, (x_BD,), hyper, which=None).compile()


def sent(program: Program, mesh: Mesh, text: str) -> list[dict]:
  """Collectives of a compiled program, by kind and by axis of the mesh."""
  chip, found = program.chip, {}
  for one in topology.collectives(text):
    group = topology.first_group(one.groups, mesh.size)
    axes = ' x '.join(topology.axes_of(group, program.mesh))
    if len(group) > 1:
      places = np.array([d.coords for d in mesh.devices.flat[group]])
      bounds = topology.bounds(program.topology)
      ways = links(places, bounds, chip)
      wire = wire_bytes(one.kind, one.size, len(group))
      row = found.setdefault(
        (one.kind, axes),
        {'kind': one.kind, 'axis': axes, 'links': ways}
        | dict.fromkeys(('count', 'bytes', 'wire_bytes', 'seconds'), 0),
      )
      row['count'] += 1
      row['bytes'] += one.size
      row['wire_bytes'] += wire
      row['seconds'] += wire / (ways * chip.network / chip.links)
  return sorted(found.values(), key=lambda row: -row['bytes'])


def measure(program: Program, args) -> dict:
  """A row, or what a chip lacks."""
  chips = program.sae * program.data * program.model
  row = {'topology': program.topology, 'chips': chips, 'mesh': program.mesh}
  try:
    mesh, compiled = compile_program(program, args)
  except jax.errors.JaxRuntimeError as error:
    needs = re.search(r'Used (\S+) of (\S+) hbm', str(error))
    if not needs:
      raise
    return row | {'does_not_fit': {'needs': needs[1], 'has': needs[2]}}
  text, cost = compiled.as_text(), compiled.cost_analysis()
  memory = compiled.memory_analysis()
  unit = 2.0 * args.batch * args.width * args.features
  moved = topology.memory_bytes(text)
  collectives = sent(program, mesh, text)
  seconds = {
    'compute': cost['flops'] * PASSES[args.precision] / program.chip.flops,
    'memory': moved / program.chip.bandwidth,
    'network': sum(c['seconds'] for c in collectives),
  }
  return row | {
    'flops_per_chip': cost['flops'],
    'units': cost['flops'] * chips / (program.sae * unit),
    'bytes_accessed': cost['bytes accessed'],
    'memory_bytes': moved,
    'collectives': collectives,
    'held': {
      'arguments': memory.argument_size_in_bytes,
      'temporary': memory.temp_size_in_bytes,
      'peak': memory.peak_memory_in_bytes,
      'chip': program.chip.memory,
    },
    'seconds': seconds,
    **predict(seconds, program.sae * args.batch),
  }


HEADS = [
  'chips', 'sae x data x model', 'units', 'TFLOP', 'moved, GB',
  'sent over model, MB', 'over data, MB', 'arguments, GB', 'temporary', 'peak',
  'compute, ms', 'memory, ms', 'network, ms', 'thousand tokens per second',
]  # fmt: skip


def cells(row: dict) -> list[str]:
  """A row of the table; the bound is bold."""
  sizes = ' x '.join(str(n) for n in row['mesh'].values())
  first = [row['topology'], sizes]
  if 'does_not_fit' in row:
    needs = '{needs} of {has}'.format(**row['does_not_fit'])
    return [*first, *[''] * 7, f'**needs {needs}**', *[''] * 4]
  over = lambda axis: sum(
    c['wire_bytes'] for c in row['collectives'] if axis in c['axis']
  )
  times = [
    f'**{t / MS:.2f}**' if name == row['bound'] else f'{t / MS:.2f}'
    for name, t in row['seconds'].items()
  ]
  rates = row['tokens_per_second']
  return [
    *first,
    f'{row["units"]:.2f}',
    f'{row["flops_per_chip"] / 1e12:.2f}',
    f'{row["memory_bytes"] / GB:.2f}',
    *(f'{over(axis) / MB:.0f}' for axis in ('model', 'data')),
    *(f'{row["held"][k] / GB:.2f}' for k in ('arguments', 'temporary', 'peak')),
    *times,
    f'{rates["one_after_the_other"] / 1e3:,.0f} to '
    f'{rates["overlapped"] / 1e3:,.0f}',
  ]


def parse():
  flags = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], allow_abbrev=False
  )
  flags.add_argument('--width', type=int, default=3072, help='D')
  flags.add_argument('--features', type=int, default=131_072, help='F')
  flags.add_argument('--batch', type=int, default=4096, help='B')
  flags.add_argument('--members', type=int, default=16, help='SAEs of a group.')
  flags.add_argument('--precision', choices=tuple(PASSES), default='bfloat16')
  flags.add_argument(
    '--only', default='', help="Part of 'v5e:2x4 sae=1 data=1 model=8'."
  )
  flags.add_argument('--plot', default='', help='An SVG file to write.')
  flags.add_argument('--results', default=str(record.RESULTS))
  return flags.parse_args()


def main():
  args = parse()
  jax.config.update('jax_platforms', 'cpu')
  chosen = [
    p
    for p in programs(args.features, args.batch, args.members)
    if args.only in str(p)
  ]
  settings = {
    k: v for k, v in vars(args).items() if k not in ('results', 'plot')
  }
  rows = []
  print(record.table(HEADS, []), flush=True)
  for program in chosen:
    row = measure(program, args)
    record.append(
      args.results,
      'scaling',
      settings=settings,
      rows=[row],
      versions={'libtpu': importlib.metadata.version('libtpu')},
    )
    rows.append(row)
    print(f'| {" | ".join(cells(row))} |', flush=True)
  if args.plot:
    pathlib.Path(args.plot).write_text(draw(rows))


if __name__ == '__main__':
  main()
