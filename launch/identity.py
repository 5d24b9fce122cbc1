"""What a run is: its folder, named once, holds all there is of it.

    gs://bucket/runs/NAME/
      config.json            the config, with what the command line changed
      launch.json            what was asked for, so that `watch` can ask again
      code/ID.tar.gz         the working tree, by its content
      code/ID.json ID.diff   its commit, and what was not committed
      store/                 unless --store is elsewhere
      checkpoints/ metrics.jsonl tensorboard/ eval/    as of any workdir
      logs/                  what each step printed, by start and host
      state/                 how far it is, as its first host said last

A run of the same name goes on; another config under that name is refused.
"""

import contextlib
import json
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from gsae_jax import checks, paths
from gsae_jax.errors import UserError
from launch.patience import Unreachable

_MISSING = '(missing)'
ROLES = ('trainer', 'evaluator')
OVER = ('finished', 'failed', 'deleted')  # States after which nothing comes.


def open_run(path: str, *, remote: bool) -> epath.Path:
  """The folder of a run, which need not be there.

  Args:
    path: what `--run` says.
    remote: other machines must reach it.

  Raises:
    UserError: it is on storage that they cannot reach, or that cannot be used.
  """
  if remote and paths.split(path)[0] != 'gs':
    raise UserError(
      f'--run: {path!r} is not in a bucket, which every machine could reach; '
      'give gs://BUCKET/runs/NAME'
    )
  # What it logs is said below, in a line.
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
  run = paths.workdir(path.rstrip('/'), '--run')
  if remote and not paths.split(str(run))[1].partition('/')[2]:
    raise UserError(f'--run: {path} is a whole bucket; give gs://BUCKET/NAME')
  return run


@contextlib.contextmanager
def storage(run: epath.Path, what: str) -> Iterator[None]:
  """Makes one line of whatever a bucket or a disk refuses in the block."""
  try:
    yield
  except UserError:
    raise
  except Exception as e:  # Clients of buckets have dozens of their own.
    why = ' '.join(str(e).split())[:300] or type(e).__name__
    remedy = 'check the folder and its permissions'
    if paths.is_remote(run):
      remedy = (
        'check that the bucket is there and yours to write, and the credentials '
        '(gcloud auth application-default login)'
      )
    raise Unreachable(f'--run: cannot {what} {run} ({why}); {remedy}') from e


def read_json(path: epath.Path) -> dict | None:
  """What a file holds; None if it is not there."""
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except ValueError as e:
    raise UserError(f'{path} is not JSON ({e}); delete it') from e


def write_json(path: epath.Path, value: dict) -> None:
  paths.write_whole(path, json.dumps(value, indent=1) + '\n')


def flat(tree, prefix: str = '') -> dict[str, object]:
  """Values by dotted name, as `--config.train.steps` has them."""
  items: Iterable[tuple[Any, Any]]
  if isinstance(tree, dict):
    items = tree.items()
  elif isinstance(tree, list) and any(isinstance(v, dict) for v in tree):
    # Members of a run go by their names.
    items = ((v.get('name', i), v) for i, v in enumerate(tree))
  else:
    return {prefix: tree}
  found: dict[str, object] = {}
  for name, value in items:
    found |= flat(value, f'{prefix}.{name}' if prefix else str(name))
  return found


def differences(there: dict, here: dict) -> list[str]:
  """What differs between two configs: `field: there, and here`."""
  a, b = flat(there), flat(here)
  show = lambda found, name: repr(found[name]) if name in found else _MISSING
  return [
    f'{name} is {show(a, name)} there and {show(b, name)} here'
    for name in sorted(a.keys() | b.keys())
    if a.get(name, _MISSING) != b.get(name, _MISSING)
  ]


def _names(*trees: dict) -> set[str]:
  """Dotted names of all that configs have, and of groups of them."""
  names = {'store'}
  for name in set().union(*map(flat, trees)):
    parts = name.split('.')
    names |= {'.'.join(parts[:n]) for n in range(1, len(parts) + 1)}
  return names


def check_config(
  run: epath.Path, config: dict, allowed: tuple[str, ...] = ()
) -> None:
  """Refuses a run's name that another config has.

  Args:
    run: the run's folder.
    config: plain data, as JSON gives it back.
    allowed: fields that may differ, as `train.steps`.

  Raises:
    UserError: names fields that differ, or of `allowed` one that there is not.
  """
  there = read_json(run / 'config.json') or config
  names = _names(there, config)
  for field in allowed:
    checks.known_field(field, names)
  found = []
  for line in differences(there, config):
    field = line.split()[0]
    if _MISSING in line and field.startswith('saes.'):
      # A member is left out, or added, as a whole.
      field = '.'.join(field.split('.')[:2])
    elif checks.is_fixed(field):
      raise UserError(
        f'--run: {run.name} has another config ({line}), and this field cannot '
        'change within a run; give this one another name'
      )
    if not any(f'{field}.'.startswith(f'{a}.') for a in allowed):
      found.append((field, line))
  if found:
    lines = '; '.join(line for _, line in found[:3])
    more = f', and {len(found) - 3} more' if len(found) > 3 else ''
    raise UserError(
      f'--run: {run.name} has another config ({lines}{more}); '
      'give this one another name, or allow the change by '
      f'--allow-config-change={found[0][0]}'
    )


def tell(
  run: epath.Path, role: str, state: str, step: str | None, reason: str | None
) -> None:
  """Writes how far a role of a run is."""
  value = {'state': state, 'step': step, 'reason': reason, 'time': now()}
  write_json(run / 'state' / f'{role}.json', value)


def tell_deleted(run: epath.Path, roles: tuple[str, ...]) -> None:
  """Writes that roles were deleted, but for those that had finished."""
  about = told(run)
  for role in roles:
    if about.get(role, {}).get('state') != 'finished':
      tell(run, role, 'deleted', None, None)


def begin(run: epath.Path, roles: tuple[str, ...]) -> None:
  """Writes that nothing is known yet of these roles; the others are gone."""
  for role in ROLES:
    if role in roles:
      tell(run, role, 'submitted', None, None)
    else:
      (run / 'state' / f'{role}.json').unlink(missing_ok=True)


def told(run: epath.Path) -> dict[str, dict]:
  """How far each role of a run is."""
  found = {role: read_json(run / 'state' / f'{role}.json') for role in ROLES}
  return {role: about for role, about in found.items() if about}


def now() -> str:
  return time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())


def check_free(run: epath.Path, target: str) -> None:
  """Refuses a run that another kind of machines may be at.

  Raises:
    UserError: says how to end it.
  """
  launch = read_json(run / 'launch.json')
  if launch is None or launch['target'] == target:
    return
  about = told(run).get('trainer')
  if about and about['state'] not in OVER:
    raise UserError(
      f'--run: {run} was submitted by `launch {launch["target"]}` and is '
      f'{about["state"]}; delete it there first'
    )
