r"""Runs on machines that are lent, and what to know before.

  python -m launch preflight --config=experiments/gemma_7b.py --topology=v5e:4x4
  python -m launch tpu   submit --config=C.py --run=gs://BUCKET/runs/NAME \
      --topology=v5e:4x4 --project=PROJECT --zone=us-west4-a --spot
  python -m launch gke   submit --config=C.py --run=gs://BUCKET/runs/NAME \
      --topology=v5e:4x4
  python -m launch local submit --config=C.py --run=FOLDER --processes=2
  python -m launch tpu|gke|local status|watch|logs|delete --run=...

submit asks for the machines of a run: harvest, training and evaluation, or what
is left of them. watch follows a run to its end, and asks again for machines
that were taken away. `submit --help` and so on have the flags. See docs/tpu.md.
"""

import importlib
import sys

from gsae_jax import program
from gsae_jax.errors import FAILED, UserError

_TARGETS = ('tpu', 'gke', 'local')
_VERBS = ('submit', 'status', 'watch', 'logs', 'delete')


def main(argv: list[str]) -> None:
  """Runs what the first words say; their module has the flags of the rest."""
  match argv[1:]:
    case ['preflight', *rest]:
      name, words = 'launch.preflight.command', 'preflight'
    case [target, verb, *rest] if target in _TARGETS and verb in _VERBS:
      name, words = f'launch.{target}', f'{target} {verb}'
    case ['--help' | '-h' | '--helpfull']:
      print(__doc__)
      return
    case [target, *rest] if target in _TARGETS:
      _refuse(rest, _VERBS)
    case rest:
      _refuse(rest, ('preflight', *_TARGETS))
  sys.argv = [f'launch {words}', *rest]
  try:
    module = importlib.import_module(name)
  except UserError as e:  # A client of the cloud is not installed.
    print(f'error: {e}', file=sys.stderr)
    sys.exit(FAILED)
  if words == 'preflight':
    program.run(module.main)
  module.define(verb)
  program.run(getattr(module, verb))


def _refuse(given: list[str], instead: tuple[str, ...]) -> None:
  what = f'{given[0]!r} is not' if given else 'the next word must be'
  print(
    f'error: {what} one of {", ".join(instead)}; see python -m launch --help',
    file=sys.stderr,
  )
  sys.exit(FAILED)


if __name__ == '__main__':
  main(sys.argv)
