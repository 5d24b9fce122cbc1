"""What is shown of a run, read from its folder: states and logs."""

import sys

from etils import epath

from gsae_jax.errors import UserError
from launch import identity
from launch import logs as logs_lib


def show_state(run: epath.Path) -> None:
  """Prints how far each role said that it was."""
  with identity.storage(run, 'read'):
    found = identity.told(run)
  for role, about in found.items():
    where = f' at {about["step"]}' if about['step'] else ''
    why = f', {about["reason"]}' if about['reason'] else ''
    print(f'{role}: {about["state"]}{where}{why}, {about["time"]}')


def is_over(run: epath.Path, role: str) -> bool:
  """Whether a role has come to its end, a good one or not."""
  with identity.storage(run, 'read'):
    about = identity.told(run).get(role)
  return about is not None and about['state'] in identity.OVER


def conclude(run: epath.Path) -> None:
  """Prints how a run ended.

  Raises:
    UserError: not well.
  """
  show_state(run)
  with identity.storage(run, 'read'):
    found = identity.told(run)
  for role, about in found.items():
    if about['state'] == 'failed':
      raise UserError(
        f'{role} of {run.name} failed at {about["step"]}: {about["reason"]}; '
        '`launch ... logs` shows it'
      )


def show_log(run: epath.Path, host: str) -> None:
  """Prints the newest log of a host.

  Raises:
    UserError: there is none.
  """
  with identity.storage(run, 'read'):
    log = logs_lib.latest(run, host)
    text = log and log.read_text()
  if log is None:
    raise UserError(
      f'--host: {run}/logs has none of {host!r} yet; what went wrong before a '
      'program ran is in logs/startup'
    )
  print(f'# {log}', file=sys.stderr)
  print(text)
