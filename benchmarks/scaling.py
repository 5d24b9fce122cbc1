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
import pathlib

import jax

from benchmarks import record
from experiments import quickstart
from gsae_jax import config as config_lib
from gsae_jax.mesh import make_mesh
from gsae_jax.sae.layers import PRECISIONS
from launch.preflight import measure as measure_lib
from launch.preflight import programs as programs_lib
from launch.preflight import topology
from launch.preflight.roofline import GB, best_split, draw, predict
from launch.preflight.topology import Machine

MB, MS = 1e6, 1e-3

TOPOLOGIES = {
  'v5e': ('1x1', '2x4', '8x8', '16x16'),
  'v5p': ('1x1x1', '2x2x2', '4x4x4', '4x8x8'),
  'v6e': ('1x1', '2x4', '8x8', '16x16'),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """The step of some SAEs on some chips."""

  topology: str
  sae: int
  data: int
  model: int

  @property
  def machine(self) -> Machine:
    return topology.machine(self.topology)

  @property
  def mesh(self) -> dict[str, int]:
    return {'sae': self.sae, 'data': self.data, 'model': self.model}

  def __str__(self) -> str:
    return f'{self.topology} sae={self.sae} data={self.data} model={self.model}'


def cases(features: int, batch: int, members: int) -> list[Case]:
  """One SAE on every topology; on the largest, also not divided by rows."""
  found = []
  for generation, shapes in TOPOLOGIES.items():
    for shape in shapes:
      name = f'{generation}:{shape}'
      chips = topology.machine(name).chips
      found.append(Case(name, 1, *best_split(chips, features, batch)))
    found.append(Case(name, 1, 1, chips))
    if members > 1 and chips % members == 0:
      split = best_split(chips // members, features, batch)
      found.append(Case(name, members, *split))
  return list(dict.fromkeys(found))


def make_program(case: Case, args) -> measure_lib.Program:
  """What gsae_jax.train compiles, for chips that are not there."""
  raw = quickstart.get_config()
  raw.saes = tuple(
    {
      'name': f'{i}',
      'architecture': 'gated',
      'site': 'mlp_out.0',
      'features': args.features,
      'l1': 1.0,
    }
    for i in range(case.sae)
  )
  raw.train.batch_size = args.batch
  raw.train.precision = args.precision
  config = config_lib.parse(raw)
  mesh = make_mesh(**case.mesh, devices=topology.devices(case.machine))
  widths = dict.fromkeys(config.sites, args.width)
  (group,) = programs_lib.groups(config, widths, mesh)
  return programs_lib.step(group, config, case.machine, mesh)


def measure(case: Case, args) -> dict:
  """A row, or what a chip lacks."""
  machine = case.machine
  row = {'topology': case.topology, 'chips': machine.chips, 'mesh': case.mesh}
  try:
    found = measure_lib.measure(make_program(case, args))
  except measure_lib.DoesNotFit as error:
    return row | {'does_not_fit': error.words}
  unit = 2.0 * args.batch * args.width * args.features
  units = found['flops_per_chip'] * machine.chips / (case.sae * unit)
  held = found['held'] | {'chip': machine.chip.memory}
  rates = predict(found['seconds'], case.sae * args.batch)
  return row | found | {'units': units, 'held': held} | rates


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
  flags.add_argument('--precision', choices=PRECISIONS, default='bfloat16')
  flags.add_argument(
    '--only', default='', help="Part of 'v5e:2x4 sae=1 data=1 model=8'."
  )
  flags.add_argument('--plot', default='', help='An SVG file to write.')
  flags.add_argument('--results', default=str(record.RESULTS))
  return flags.parse_args()


def main():
  args = parse()
  jax.config.update('jax_platforms', 'cpu')
  settings = {
    k: v for k, v in vars(args).items() if k not in ('results', 'plot')
  }
  rows = []
  print(record.table(HEADS, []), flush=True)
  for case in cases(args.features, args.batch, args.members):
    if args.only not in str(case):
      continue
    row = measure(case, args)
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
