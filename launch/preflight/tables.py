"""The tables of docs/preflight.md: the paper's three models on four slices.

  PYTHONPATH=LIBTPU python -m launch.preflight.tables [--only=WORDS]

Compiles what is not yet in benchmarks/results/preflight.jsonl, a line for each
part of each case, so that it goes on where it was interrupted, and writes the
tables anew. Delete lines to compile them again. Without network and weights.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import pathlib
import tempfile
import time
from typing import Any

import jax

from gsae_jax import config as config_lib
from gsae_jax.config import Config
from gsae_jax.mesh import axis_sizes
from launch.preflight import meshes, parts, show, topology
from launch.preflight.examine import examine, work_of
from launch.preflight.model import Model, read_model
from launch.preflight.roofline import GIB

ROOT = pathlib.Path(__file__).parent.parent.parent
RESULTS = ROOT / 'benchmarks' / 'results' / 'preflight.jsonl'
PAGE = ROOT / 'docs' / 'preflight.md'
MARK = '<!-- What follows is what the command writes. -->\n'

SLICES = ('v5e:2x4', 'v5e:4x4', 'v6e:2x4', 'v5p:2x2x2')

# What config.json of each says, or the defaults of its class.
RAW = {
  'gemma_7b': {'model_type': 'gemma'},
  'pythia_2p8b': {
    'model_type': 'gpt_neox', 'vocab_size': 50_304, 'hidden_size': 2560,
    'num_hidden_layers': 32, 'num_attention_heads': 32, 'bos_token_id': 0,
    'intermediate_size': 10_240, 'max_position_embeddings': 2048,
    'rotary_pct': 0.25, 'eos_token_id': 0,
  },
  'gelu_1l': {
    'model_type': 'gelu_1l', 'n_layers': 1, 'd_model': 512, 'n_heads': 8,
    'd_head': 64, 'd_mlp': 2048, 'd_vocab': 48_262, 'n_ctx': 1024, 'eps': 1e-5,
  },
}  # fmt: skip
NAMES = {
  'gemma_7b': 'Gemma-7B',
  'pythia_2p8b': 'Pythia-2.8B',
  'gelu_1l': 'GELU-1L',
}


@dataclasses.dataclass(frozen=True)
class Case:
  """An experiment on a slice.

  Attributes:
    experiment: of the folder `experiments`.
    topology: the slice.
  """

  experiment: str
  topology: str

  def __str__(self) -> str:
    return f'{NAMES[self.experiment]} on {self.topology}'


CASES = [Case(name, topology) for name in RAW for topology in SLICES]


def resolve(case: Case, folder: str) -> tuple[Config, Model]:
  """The config of a case, with a mesh that fits if there is one.

  Args:
    case: which.
    folder: to write config.json to.
  """
  experiment = importlib.import_module(f'experiments.{case.experiment}')
  raw = experiment.get_config()
  raw.lm.path = folder
  pathlib.Path(folder, 'config.json').write_text(
    json.dumps(RAW[case.experiment])
  )
  machine = topology.machine(case.topology)
  config = config_lib.parse(raw)
  model = read_model(config.lm)
  work = work_of(config, model, machine)
  mesh = config.mesh
  sizes = axis_sizes(mesh.data, mesh.model, mesh.sae, machine.chips)
  now = meshes.estimate(work, machine, *sizes.values())
  if now.needs > machine.chip.usable:
    now = meshes.rank(work, machine)[0]
  raw.mesh.sae, raw.mesh.data, raw.mesh.model = now.sizes
  return config_lib.parse(raw), model


def compile_case(case: Case, part: str) -> dict[str, Any]:
  """A line of the file."""
  start = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    config, model = resolve(case, folder)
  machine = topology.machine(case.topology)
  found = examine(config, model, machine, wanted=(part,), tries=0)
  return {
    'case': str(case),
    'part': part,
    'mesh': found.mesh,
    'saes': len(config.saes),
    'rows': found.rows,
    'total': found.totals[part],
    'problems': found.problems,
    'took': round(time.monotonic() - start, 1),
    'versions': {
      name: importlib.metadata.version(name) for name in ('jax', 'libtpu')
    },
    'date': time.strftime('%Y-%m-%d', time.gmtime()),
  }


def read(path: pathlib.Path) -> dict[tuple[str, str], dict[str, Any]]:
  """Lines by case and part; the last of each."""
  lines = path.read_text().splitlines() if path.exists() else []
  rows = [json.loads(line) for line in lines]
  return {(row['case'], row['part']): row for row in rows}


def overview(done: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
  """A row for each case."""
  lines = [
    show.line(
      (
        'experiment', 'SAEs', 'sae x data x model',
        *(f'{p}, GiB a chip' for p in parts.PARTS),
        'thousand tokens/s: harvest', 'train', 'evaluate', 'train, h',
        'train is bound by', 'must read, MB/s',
      )
    ),
    show.line(['---'] * 12),
  ]  # fmt: skip
  for case in CASES:
    found = [done.get((str(case), part)) for part in parts.PARTS]
    first = next((row for row in found if row), None)
    if first is None:
      continue
    totals = [row['total'] if row else {} for row in found]
    mesh = ' x '.join(str(n) for n in first['mesh'].values())
    lines.append(
      show.line(
        (
          str(case),
          str(first['saes']),
          mesh,
          *map(_held, totals),
          *(_rates(t) for t in totals),
          show.between(totals[1]['hours']) if 'hours' in totals[1] else '',
          totals[1].get('bound', ''),
          show.between([s / show.MB for s in totals[1]['storage']])
          if 'storage' in totals[1]
          else '',
        )
      )
    )
  return lines


def _held(total: dict[str, Any]) -> str:
  if not total:
    return ''
  needs = f'{total["needs"] / GIB:.2f}'
  if total['fits']:
    return needs
  return f'**{needs} of {total["usable"] / GIB:.2f}**'


def _rates(total: dict[str, Any]) -> str:
  rates = total.get('tokens_per_second')
  return show.between([r / 1e3 for r in rates]) if rates else ''


def page(done: dict[tuple[str, str], dict[str, Any]]) -> str:
  """Everything below the mark."""
  out = ['', '## All cases', '', *overview(done)]
  for case in CASES:
    found = [
      done[k] for k in ((str(case), p) for p in parts.PARTS) if k in done
    ]
    if not found:
      continue
    out += ['', f'### {case}', '']
    out += [f'{problem}.\n' for row in found for problem in row['problems']]
    out += [show.line(show.HEADS), show.line(['---'] * len(show.HEADS))]
    out += [
      show.line(
        show.cells(row | {'program': f'{row["part"]}: {row["program"]}'})
      )
      for line in found
      for row in line['rows']
    ]
  took = sum(row['took'] for row in done.values()) / 60
  dates = sorted(row['date'] for row in done.values())
  versions = {json.dumps(row['versions']) for row in done.values()}
  about = '; '.join(
    ', '.join(f'{k} {v}' for k, v in json.loads(one).items())
    for one in sorted(versions)
  )
  out[1:1] = [f'{about}; {dates[0]} to {dates[-1]}; {took:.0f} min in all.', '']
  return '\n'.join(out) + '\n'


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--only', default='', help='Part of a case and its part.')
  parser.add_argument('--results', type=pathlib.Path, default=RESULTS)
  parser.add_argument('--page', type=pathlib.Path, default=PAGE)
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  done = read(args.results)
  for case in CASES:
    for part in parts.PARTS:
      if args.only in f'{case} {part}' and (str(case), part) not in done:
        print(f'\n{case}', flush=True)
        row = compile_case(case, part)
        with args.results.open('a') as f:
          f.write(json.dumps(row) + '\n')
        done[str(case), part] = row
  text = args.page.read_text().partition(MARK)[0]
  args.page.write_text(text + MARK + page(done))


if __name__ == '__main__':
  main()
