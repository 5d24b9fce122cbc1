"""What every command shares: flags, one-line errors, exit codes, signals."""

import re
import signal
import sys
from collections.abc import Callable

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


def define_config() -> flags.FlagHolder:
  return config_flags.DEFINE_config_file(
    'config', None, 'Experiment file with get_config().', lock_config=True
  )


def read_config(holder: flags.FlagHolder) -> ml_collections.ConfigDict:
  """The value of `--config`.

  Raises:
    UserError: the file is not there, or running it failed.
  """
  value = holder.value
  try:
    hasattr(value, 'to_dict')  # config_flags puts its errors off until here.
    return value
  except Exception as e:
    raise UserError(f'--config: {_last_line(e)}') from e


def _last_line(error: Exception) -> str:
  """Where absl and ml_collections say what happened, below where it did."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return lines[-1] if lines else type(error).__name__


def run(
  main: Callable[..., int | None], arguments: tuple[str, ...] = ()
) -> None:
  """Runs a command and exits with its code: 0, 1 or 42.

  Args:
    main: gets the arguments that are not flags.
    arguments: what those are called.
  """
  app.run(
    lambda argv: _guarded(main, argv[1:], arguments), flags_parser=_parse_flags
  )


def _guarded(main, given: list[str], arguments: tuple[str, ...]) -> None:
  # Orbax tells of every save and restore; what goes wrong is raised.
  logging.set_verbosity(logging.ERROR)
  try:
    if given[len(arguments) :]:
      extra = given[len(arguments)]
      raise UserError(f'unexpected argument {extra!r}; flags start with --')
    if len(given) < len(arguments):
      raise UserError(f'{arguments[len(given)]} is missing; see --help')
    sys.exit(main(*given) or 0)
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


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
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


def _fail(reason) -> None:
  print(f'error: {reason}', file=sys.stderr)
  sys.exit(FAILED)
