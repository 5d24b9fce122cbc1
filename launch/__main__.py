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

import functools
import importlib
import sys

from gsae_jax import program
from gsae_jax.errors import FAILED, UserError

_TARGETS = ('tpu', 'gke', 'local')
_VERBS = ('submit', 'status', 'watch', 'logs', 'delete')


def find(words: list[str]) -> tuple[program.Command, str, list[str]]:
  """Returns the command that the first words name, its name, and the rest.

  Raises:
    UserError: they name none, or a client of the cloud is not installed.
  """
  match words:
    case ['preflight', *rest]:
      module = importlib.import_module('launch.preflight.command')
      return module.COMMAND, 'preflight', rest
    case [target, verb, *rest] if target in _TARGETS and verb in _VERBS:
      module = importlib.import_module(f'launch.{target}')
      define_flags = functools.partial(module.define_flags, verb=verb)
      command = program.Command(define_flags, getattr(module, verb))
      return command, f'{target} {verb}', rest
    case [target, *rest] if target in _TARGETS:
      raise _unknown(rest, _VERBS)
    case _:
      raise _unknown(words, ('preflight', *_TARGETS))


def _unknown(given: list[str], instead: tuple[str, ...]) -> UserError:
  what = f'{given[0]!r} is not' if given else 'the next word must be'
  return UserError(
    f'{what} one of {", ".join(instead)}; see python -m launch --help'
  )


def main(argv: list[str]) -> None:
  """Runs the command that the arguments name; exits with its code."""
  if argv[1:2] in (['--help'], ['-h'], ['--helpfull']):
    print(__doc__)
    return
  try:
    command, name, rest = find(argv[1:])
  except UserError as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(FAILED)
  sys.argv = [f'launch {name}', *rest]
  command.run()


if __name__ == '__main__':
  main(sys.argv)
