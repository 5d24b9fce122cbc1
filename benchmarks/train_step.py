r"""Tokens per second of one training step of a Gated SAE, against its peers.

  python -m benchmarks.train_step [--features=16384] [--sides=saelens,dense]

Every side is a process of its own, starts from the same parameters, sees the same
activations, and takes one step a round (`turns`). Ratios are medians of the ratios
of rounds. On a CPU all sides share one core, with a thread each; with --device=gpu
PyTorch's run under bfloat16 autocast, and ours with precision='bfloat16'.

`saelens` is SAETrainer.step, `dictionary_learning` is GatedSAETrainer.update,
`torch` the same algebra as ours by hand, `dense` and `sparse` are what
gsae_jax.train runs, metrics and all. The machine's peak is that of the three
products of the step at the same sizes, in the same rounds, by JAX.

Peers live in an environment of their own, .venv-bench, which `make bench` installs.
"""

import dataclasses
import json
import sys
import tempfile

from benchmarks import comparison, record, synthetic, turns
from benchmarks.products import PRODUCTS, command
from benchmarks.settings import Settings
from benchmarks.train_worker import OURS, PEERS


def parse():
  flags = record.parser(__doc__, rounds=11)
  flags.add_argument('--width', type=int, default=512)
  flags.add_argument('--features', type=int, default=4096)
  flags.add_argument('--batch', type=int, default=1024)
  flags.add_argument(
    '--l0',
    type=float,
    default=32,
    help='Open gates per token; 0: half of them, as at the start of training.',
  )
  flags.add_argument('--l1', type=float, default=0.1)
  # So small that as many gates are open at the end as at the start.
  flags.add_argument('--learning_rate', type=float, default=3e-7)
  flags.add_argument('--sides', default=','.join((*PEERS, *OURS)))
  flags.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
  flags.add_argument('--core', type=int, default=0, help='Of the CPU.')
  flags.add_argument('--steps', type=int, default=1, help='Of a turn.')
  flags.add_argument('--peers_python', default='.venv-bench/bin/python')
  args = flags.parse_args()
  args.sides = args.sides.split(',')
  for side in args.sides:
    if side not in PEERS + OURS:
      sys.exit(
        f'error: --sides: there is no {side!r}; there are '
        f'{", ".join(PEERS + OURS)}'
      )
  python = record.ROOT / args.peers_python
  if set(args.sides) & set(PEERS) and not python.exists():
    sys.exit(
      f'error: --peers_python: there is no {python}; `make bench` installs it'
    )
  return args


def commands(args, settings: Settings, folder: str) -> dict[str, list[str]]:
  """What runs each side, and the products."""
  told = json.dumps(dataclasses.asdict(settings))
  peers = str(record.ROOT / args.peers_python)
  sides = {
    name: [
      peers if name in PEERS else sys.executable,
      *('-m', 'benchmarks.train_worker', name, told, folder),
    ]
    for name in args.sides
  }
  s = settings
  sizes = s.batch, s.width, s.features
  return sides | {
    PRODUCTS: command(*sizes, device=s.device, times=s.steps, gradient=True)
  }


def measure(args, settings: Settings):
  """What came of the turns, and the open gates at the start."""
  rows = synthetic.BATCHES * settings.batch
  x_ND = synthetic.activations(rows, settings.width)
  params = synthetic.parameters(x_ND, settings.features, settings.l0)
  with tempfile.TemporaryDirectory() as folder:
    synthetic.write(folder, x_ND, params)
    opened = synthetic.open_gates(params | {'W_gate': params['W_dec'].T}, x_ND)
    del x_ND, params
    measured = turns.measure(
      commands(args, settings, folder),
      rounds=args.rounds,
      core=args.core if settings.device == 'cpu' else None,
    )
  return measured, opened


def main():
  args = parse()
  names = [f.name for f in dataclasses.fields(Settings)]
  settings = Settings(**{name: getattr(args, name) for name in names})
  measured, opened = measure(args, settings)
  found, failed, busy = measured
  for name, reason in failed.items():
    print(f'error: {name}: {reason.removeprefix("error: ")}', file=sys.stderr)
  if found.keys() <= {PRODUCTS}:
    sys.exit(1)
  rows = comparison.make_rows(
    found, tokens=settings.batch, times=settings.steps, unit=settings.unit
  )
  theirs = [found[name]['versions'] for name in PEERS if name in found]
  pinned = {'core': args.core} if settings.device == 'cpu' else {}
  record.append(
    args.results,
    'train_step',
    settings=dataclasses.asdict(settings) | {'rounds': args.rounds} | pinned,
    rows=rows,
    hardware=comparison.accelerators(rows),
    versions={'peers': theirs[0]} if theirs else {},
    l0_at_start=opened,
    failed=failed,
    others_busy=busy,
  )
  bases = [name for name in PEERS if name in found] or args.sides[:1]
  more = {'first_loss': ('first loss', '.4f'), 'l0': ('L0', '.1f')}
  print(
    f'd={settings.width} F={settings.features} B={settings.batch}, L0 '
    f'{opened:.1f} at the start, a unit is {settings.unit / 1e9:.2f} GFLOP\n'
  )
  print(comparison.table(rows, bases, more))
  comparison.warn(busy)
  sys.exit(bool(failed))


if __name__ == '__main__':
  main()
