"""Runs commands one after the other in a process that stays, for commands.py.

Each line of standard input is a request, each line of standard output its answer.
An interpreter starts and JAX is imported once, and not for every command.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import traceback
import warnings


def find(module: str, words: list[str]):
  """Returns the command of a module, and the words that are its arguments."""
  if module == 'launch':
    command, _, rest = importlib.import_module('launch.__main__').find(words)
    return command, rest
  return importlib.import_module(module).COMMAND, words


def call(module: str, words: list[str]) -> dict:
  """Returns exit code, standard output and standard error of a command."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      command, rest = find(module, words)
      code = command.call(rest)
    except Exception:  # As the interpreter of a command would end.
      traceback.print_exc()
      code = 1
  return {'code': code, 'out': out.getvalue(), 'err': err.getvalue()}


def main():
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # What native code prints is no answer.
  warnings.filterwarnings('error', module=r'(gsae_jax|launch|experiments)\b')
  for line in sys.stdin:
    answer = call(**json.loads(line))
    if hasattr(timing := sys.modules.get('sitecustomize'), 'report'):
      timing.report(stays=True)
    answers.write(json.dumps(answer) + '\n')
    answers.flush()


if __name__ == '__main__':
  main()
