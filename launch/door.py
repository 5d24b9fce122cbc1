"""The door: flags that targets share, and the run that they describe."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_flags

from gsae_jax import paths, program
from gsae_jax.errors import UserError
from launch import identity, package, specs
from launch.submission import Submission


def define_run(values: flags.FlagValues) -> None:
  """Adds the flags of every verb."""
  program.define_config(values)
  flags.DEFINE_string(
    'run',
    None,
    'The folder of the run, gs://BUCKET/runs/NAME.',
    flag_values=values,
  )
  flags.mark_flag_as_required('run', values)


def define_submission(values: flags.FlagValues) -> None:
  """Adds the flags of `submit`."""
  flags.DEFINE_string(
    'store',
    None,
    'The activation store, if it is not of this run alone.',
    flag_values=values,
  )
  flags.DEFINE_list(
    'steps',
    None,
    'Of harvest, train and evaluate; all, if left out.',
    flag_values=values,
  )
  flags.DEFINE_multi_string(
    'allow-config-change',
    [],
    'A field that may differ from the run so far.',
    flag_values=values,
  )
  flags.DEFINE_bool(
    'dry_run',
    False,
    'Show what would be sent, and send nothing.',
    flag_values=values,
  )
  flags.mark_flag_as_required('config', values)


def define_machines(values: flags.FlagValues) -> None:
  """Adds the flags of `submit` on rented machines."""
  flags.DEFINE_string(
    'topology', None, 'TPU slice, as preflight: v5e:4x4.', flag_values=values
  )
  flags.DEFINE_integer(
    'slices', 1, 'How many of them, as one mesh.', flag_values=values
  )
  flags.DEFINE_string(
    'evaluator',
    None,
    'Another slice that evaluates while the first trains.',
    flag_values=values,
  )
  flags.DEFINE_multi_string(
    'env',
    [],
    'NAME=VALUE for the programs. Whoever sees the run sees it too.',
    flag_values=values,
  )
  flags.mark_flag_as_required('topology', values)


def define_following(
  values: flags.FlagValues, verb: str, seconds: float
) -> None:
  """Adds the flags of `watch` and `logs`."""
  if verb == 'watch':
    flags.DEFINE_float(
      'poll_seconds', seconds, 'How often it looks.', flag_values=values
    )
  if verb == 'logs':
    flags.DEFINE_string(
      'host', '0-0', 'SLICE-HOST whose log is shown.', flag_values=values
    )


def run_folder(given: flags.FlagValues, *, remote: bool) -> epath.Path:
  """What `--run` names; where machines are lent, its name fits theirs."""
  run = identity.open_run(given.run, remote=remote)
  if remote:
    specs.check_name(run.name)
  return run


def read_launch(
  given: flags.FlagValues, target: str, *, remote: bool
) -> tuple[epath.Path, dict]:
  """The run of `--run`, and what was asked for.

  Raises:
    UserError: it was never submitted, elsewhere, or with another `--config`.
  """
  run = run_folder(given, remote=remote)
  with identity.storage(run, 'read'):
    launch = identity.read_json(run / 'launch.json')
    if launch is None:
      raise UserError(f'--run: {run} was never submitted')
    if launch['target'] != target:
      raise UserError(
        f'--run: {run} was submitted by `launch {launch["target"]}`, which knows '
        'about it'
      )
    if given['config'].present:
      identity.check_config(run, _plain(program.read_config(given)))
  return run, launch


def read_submission(
  given: flags.FlagValues, *, chips: int, remote: bool, bare: bool = False
) -> Submission:
  """Returns what the flags of `submit` describe.

  Args:
    given: the parsed flags.
    chips: that training is divided over.
    remote: other machines run it.
    bare: there is nothing on them but what is sent.

  Raises:
    UserError: they do not fit together, or to the working tree.
  """
  run = run_folder(given, remote=remote)
  config = _plain(program.read_config(given))
  # Whether it has all fields is looked at below.
  streams = config.get('loader', {}).get('source') == 'stream'
  steps = _steps(given.steps, streams)
  store = given.store
  if streams and store:
    raise UserError("--store: loader.source is 'stream'; leave it out")
  if store:
    store = _store(store, remote=remote)
  root = package.root_of(pathlib.Path.cwd())
  code = package.pack(root)
  trains = bool({'train', 'stream'} & set(steps))
  config_flags = _config_flags(given, root, code, chips if trains else None)
  if bare:
    _check_reached(config, code)
  return Submission(
    run=run,
    config=config,
    config_flags=config_flags,
    steps=steps,
    store=None if streams else (store or f'{run}/store'),
    allowed=tuple(given['allow-config-change'].value or ()),
    code=code,
  )


def _store(path: str, *, remote: bool) -> str:
  """Where `--store` is, from any folder.

  Raises:
    UserError: others cannot reach it.
  """
  scheme, place = paths.split(path)
  bucket, _, name = place.partition('/')
  if remote and not (scheme in ('gs', 's3') and bucket and name):
    raise UserError(
      f'--store: {path!r} is not in a bucket; give gs://BUCKET/PATH or '
      's3://BUCKET/PATH'
    )
  return path if scheme else str(pathlib.Path(path).expanduser().absolute())


def _check_reached(config: dict[str, Any], code: package.Code) -> None:
  """Refuses files that lie here and are not sent."""
  for section in ('lm', 'text'):
    path = config[section]['path']
    here = path.startswith(('/', '~', '.')) or pathlib.Path(path).exists()
    sent = any(f == path or f.startswith(f'{path}/') for f in code.files)
    if '://' not in path and here and not sent:
      raise UserError(
        f'--config.{section}.path: {path!r} is on this machine alone; give a hub '
        'id, or put it into the clone, where git does not ignore it'
      )


def _steps(given: list[str] | None, streams: bool) -> tuple[str, ...]:
  """The steps that `--steps` leaves, in their order.

  Raises:
    UserError: it has others, or none.
  """
  known = ('train', 'evaluate') if streams else ('harvest', 'train', 'evaluate')
  wrong = [step for step in given or known if step not in known]
  if wrong or given == []:
    raise UserError(
      f'--steps: {wrong[0] if wrong else ""!r} is not one of {", ".join(known)}'
      + (" (loader.source is 'stream')" if streams else '')
    )
  steps = [step for step in known if step in (given or known)]
  return tuple('stream' if streams and s == 'train' else s for s in steps)


def _plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  try:
    return json.loads(json.dumps(config.to_dict()))
  except (AttributeError, TypeError) as e:
    raise UserError(f'--config: it is not of plain values ({e})') from e


def _config_flags(
  given: flags.FlagValues,
  root: pathlib.Path,
  code: package.Code,
  chips: int | None,
) -> tuple[str, ...]:
  """What gives a program at the root of the packed tree this config.

  Args:
    given: the parsed flags.
    root: of the tree.
    code: what is sent of it.
    chips: that its mesh is to cover.

  Raises:
    UserError: its file is not in the tree, or it cannot be run.
  """
  flag = given['config']
  name, colon, argument = config_flags.get_config_filename(flag).partition(':')
  file = pathlib.Path(name).resolve()
  below = file.relative_to(root) if file.is_relative_to(root) else None
  if below is None or str(below) not in code.files:
    raise UserError(
      f'--config: {name} is not among the files that are sent; put it into '
      f'{root}, where git does not ignore it'
    )
  changes = config_flags.get_override_values(flag)
  found = (
    f'--config={below}{colon}{argument}',
    *(f'--config.{field}={value}' for field, value in changes.items()),
  )
  words = () if chips is None else (f'--chips={chips}',)
  _check_fields(root, (*found, *words))
  return found


def _check_fields(root: pathlib.Path, given: tuple[str, ...]) -> None:
  """Lets the programs' own door look at a config, in a process of its own.

  It imports jax, which takes the chips of a machine that has some.
  """
  checked = subprocess.run(
    [sys.executable, '-m', 'launch.check', *given],
    cwd=root,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  if checked.returncode:
    lines = checked.stderr.strip().splitlines() or ['it cannot be read']
    raise UserError(lines[-1].removeprefix('error: '))


def read_environment(given: flags.FlagValues) -> dict[str, str]:
  """The variables of `--env`.

  Raises:
    UserError: one has no name or no value.
  """
  found = {}
  for text in given.env:
    name, equals, value = text.partition('=')
    if not equals or not re.fullmatch(r'[A-Za-z_]\w*', name, re.A):
      raise UserError(f'--env: {text!r} is not NAME=VALUE')
    found[name] = value
  return found


def make_pause(poll_seconds: float = 0.0) -> Callable[..., None]:
  """Returns a function that waits, and raises Preempted when a signal comes.

  It takes seconds; without them it waits `poll_seconds`. A signal ends the wait,
  and not the run.
  """
  preempted = program.Preemption()

  def pause(seconds: float = poll_seconds) -> None:
    preempted.check()
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
      time.sleep(min(0.2, left))
      preempted.check()

  return pause
