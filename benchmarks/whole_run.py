r"""A whole training run with the sparse step and without, on the embedded model.

  python -m benchmarks.whole_run --folder=DIR        (about ten minutes)

One Gated SAE of 64 times the model's width, from initial weights: half of its gates
are open, and both runs are dense until few are. The same commands as anybody
would give, on one core each, one after the other; time is the processor's, of
the steps alone, compiling included. What is compared at the end is the weights; what rounding alone does to
them, a third run says, dense and with every batch in two parts.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np

import gsae_jax
from benchmarks import record

FIELDS = {
  'store.tokens': 262_144,
  'train.steps': 1000,
  'train.batch_size': 512,
  'train.warmup_steps': 50,
  'train.l1_warmup_steps': 50,
  'train.decay_steps': 0,
  'train.checkpoint_every': 1000,
  'loader.shuffle_rows': 4096,
  'loader.source': 'memory',
}
WAYS = {
  'dense': ('--config.train.sparse=never',),
  'sparse': ('--config.train.sparse=auto',),
  'dense, two parts': (
    '--config.train.sparse=never',
    '--config.train.microbatches=2',
  ),
}


def get_config(features: int, l1: float, rate: float):
  """The quickstart's, with one SAE."""
  from experiments import quickstart

  c = quickstart.get_config()
  c.update_from_flattened_dict(FIELDS)
  c.train.learning_rate = rate
  c.train.writers = ()
  c.saes = (
    {
      'name': 'gated',
      'architecture': 'gated',
      'site': 'mlp_out.0',
      'features': features,
      'l1': l1,
    },
  )
  return c


def run(program: str, *flags: str, core: int) -> float:
  """Seconds of processor time of a command."""
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  subprocess.run(
    [sys.executable, '-m', f'gsae_jax.{program}', *flags],
    check=True,
    stdout=subprocess.DEVNULL,
    preexec_fn=lambda: os.sched_setaffinity(0, {core}),
  )
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  return sum(
    getattr(after, k) - getattr(before, k) for k in ('ru_utime', 'ru_stime')
  )


def lines(workdir: pathlib.Path) -> list[dict]:
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def furthest(a: dict, b: dict) -> tuple[float, float]:
  """The largest difference of a weight, and that of all by their norm."""
  gaps = [np.abs(np.asarray(a[k]) - np.asarray(b[k])) for k in a]
  norm = lambda arrays: np.sqrt(sum(float(np.sum(v**2)) for v in arrays))
  return max(float(g.max()) for g in gaps), norm(gaps) / norm(
    np.asarray(v) for v in a.values()
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--results', default=str(record.RESULTS))
  parser.add_argument('--folder', required=True, help='For store and workdirs.')
  parser.add_argument('--features', type=int, default=8192)
  parser.add_argument('--l1', type=float, default=0.5)
  parser.add_argument('--rate', type=float, default=3e-4)
  parser.add_argument('--core', type=int, default=0)
  args = parser.parse_args()
  folder = pathlib.Path(args.folder)
  folder.mkdir(parents=True, exist_ok=True)
  config = folder / 'config.py'
  config.write_text(
    'from benchmarks import whole_run\n'
    f'get_config = lambda: whole_run.get_config({args.features}, {args.l1}, {args.rate})\n'
  )
  common = f'--config={config}', f'--store={folder}/store'
  run('harvest', *common, core=args.core)
  rows, saes = [], []
  tokens = FIELDS['train.steps'] * FIELDS['train.batch_size']
  for way, flags in WAYS.items():
    workdir = folder / way.replace(', ', '_').replace(' ', '_')
    seconds = run(
      'train',
      *common,
      f'--workdir={workdir}',
      *flags,
      core=args.core,
    )
    told = [e for e in lines(workdir) if e['member'] and 'loss' in e]
    first = next((e['step'] for e in told if e.get('sparse_step')), None)
    rows.append(
      {
        'way': way,
        'seconds': round(seconds, 1),
        'tokens/s': round(tokens / seconds),
        'first sparse line': first,
        'last l0': round(told[-1]['l0'], 2),
        'last loss': told[-1]['loss'],
      }
    )
    saes.append(gsae_jax.load(str(workdir)))
  for row, sae in zip(rows, saes, strict=True):
    largest, relative = furthest(saes[0].params, sae.params)
    row |= {
      'x dense': round(rows[0]['seconds'] / row['seconds'], 2),
      'weights differ, at most': f'{largest:.1e}',
      'of their norm': f'{relative:.1e}',
    }
  heads = list(rows[0])
  print(record.table(heads, [[str(row[h]) for h in heads] for row in rows]))
  chosen = {k: getattr(args, k) for k in ('features', 'l1', 'rate', 'core')}
  record.append(args.results, 'whole_run', settings=chosen | FIELDS, rows=rows)


if __name__ == '__main__':
  main()
