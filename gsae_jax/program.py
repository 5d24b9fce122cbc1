"""What every command shares: flags, one-line errors, exit codes, signals."""

import dataclasses
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from gsae_jax.errors import FAILED, PREEMPTED, Preempted, UserError


class Preemption:
  """Notes SIGTERM and SIGINT, so that a loop can save and leave.

  True once one has come. Then SIGINT ends the process at once: somebody at the
  keyboard is in a hurry. SIGTERM does not: where a machine goes down it comes
  from whatever started the process, and from the system too.
  """

  def __init__(self):
    self._seen = False
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._note)

  def _note(self, number, frame):
    del number, frame
    self._seen = True
    signal.signal(signal.SIGINT, signal.SIG_DFL)

  def __bool__(self) -> bool:
    return self._seen

  def check(self) -> None:
    """Raises Preempted once a signal has come."""
    if self._seen:
      raise Preempted


def define_config(values: flags.FlagValues) -> None:
  """Adds `--config`, and `--config.FIELD` for its fields."""
  config_flags.DEFINE_config_file(
    'config',
    None,
    'Experiment file with get_config().',
    flag_values=values,
    lock_config=True,
  )


def read_config(given: flags.FlagValues) -> ml_collections.ConfigDict:
  """Returns the value of `--config`.

  Raises:
    UserError: the file is not there, or running it failed.
  """
  value = given.config
  try:
    hasattr(value, 'to_dict')  # config_flags puts its errors off until here.
    return value
  except Exception as e:
    raise UserError(f'--config: {_last_line(e)}') from e


def _last_line(error: Exception) -> str:
  """Where absl and ml_collections say what happened, below where it did."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return lines[-1] if lines else type(error).__name__


@dataclasses.dataclass(frozen=True)
class Command:
  """What `python -m` runs: flags, and a function that takes them.

  Flags are defined when the command runs, not when its module is imported, so
  that several commands can be imported, and called, by one process.

  Attributes:
    define_flags: adds the command's flags to the values that it is given.
    main: takes the parsed flags and the arguments that are not flags; returns the
      exit code, None for 0.
    arguments: names of the arguments that are not flags.
  """

  define_flags: Callable[[flags.FlagValues], None]
  main: Callable[..., int | None]
  arguments: tuple[str, ...] = ()

  def run(self) -> None:
    """Runs with this process's arguments; exits with 0, 1 or 42."""
    self.define_flags(flags.FLAGS)
    app.run(
      lambda argv: self._guarded(flags.FLAGS, argv[1:]),
      flags_parser=lambda argv: _parse_flags(flags.FLAGS, argv),
    )

  def call(self, words: Sequence[str]) -> int:
    """Runs with the arguments `words`; returns the exit code.

    It prints to `sys.stdout` and `sys.stderr`, and puts back `sys.argv` and the
    handlers of signals. For the main thread.
    """
    given = flags.FlagValues()
    self.define_flags(given)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    argv, verbosity = sys.argv, logging.get_verbosity()
    # ml_collections reads the fields that `--config.FIELD` changes from there.
    sys.argv = [argv[0], *words]
    try:
      self._guarded(given, _parse_flags(given, sys.argv)[1:])
    except SystemExit as e:
      return e.code if isinstance(e.code, int) else int(e.code is not None)
    finally:
      sys.argv = argv
      logging.set_verbosity(verbosity)
      for number, handler in handlers.items():
        signal.signal(number, handler)
    return 0

  def _guarded(self, given: flags.FlagValues, words: list[str]) -> None:
    # Orbax tells of every save and restore; what goes wrong is raised.
    logging.set_verbosity(logging.ERROR)
    try:
      if words[len(self.arguments) :]:
        extra = words[len(self.arguments)]
        raise UserError(f'unexpected argument {extra!r}; flags start with --')
      if len(words) < len(self.arguments):
        missing = self.arguments[len(words)]
        raise UserError(f'{missing} is missing; see --help')
      sys.exit(self.main(given, *words) or 0)
    except Preempted:
      print('stopped; the same command goes on', file=sys.stderr)
      sys.exit(PREEMPTED)
    except UserError as e:
      _fail(e)
    except OSError as e:
      # A bucket's client says it in lines.
      said = ' '.join(str(e).split())
      what = f'{e.filename}: {e.strerror}' if e.filename else said
      _fail(f'{what}; check the path and its permissions')
    finally:
      # Python takes its handlers away before it ends, and what is done is done.
      signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _parse_flags(values: flags.FlagValues, argv: list[str]) -> list[str]:
  try:
    return values(argv)
  except flags.Error as e:
    said = _last_line(e)
    missing = re.fullmatch(r'flag --(\S+)=None: .* other than None\.', said)
    _fail(f'--{missing[1]} is missing; see --help' if missing else said)
  except Exception as e:  # Whatever the user's config file raises.
    if unknown := _unknown_field(e, argv):
      _fail(unknown)
    # A config file that refuses its argument says all that there is to say.
    kind = '' if isinstance(e, ValueError) else f'{type(e).__name__}: '
    _fail(f'--config: {kind}{_last_line(e)}')


def _unknown_field(error: Exception, argv: list[str]) -> str | None:
  """What to say where a flag names a field that the config lacks."""
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]
  if not isinstance(error, KeyError):
    return None
  name, *near = re.findall(r'[\'"](\w+)[\'"]', str(error.args[0])) or ['']
  for given in argv:
    flag = given.partition('=')[0]
    if name and flag.startswith('--config.') and name in flag.split('.'):
      hint = f'; did you mean {near[0]!r}?' if near else ''
      return f'{flag}: the config has no {name!r}{hint}'
  return None


def _fail(reason) -> NoReturn:
  print(f'error: {reason}', file=sys.stderr)
  sys.exit(FAILED)
