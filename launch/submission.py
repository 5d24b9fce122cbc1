"""A run that is to be started, and what its hosts are told."""

import dataclasses
from typing import Any

from etils import epath

from gsae_jax import paths
from gsae_jax.errors import UserError
from launch import identity, package


@dataclasses.dataclass(frozen=True)
class Submission:
  """A run that is to be started.

  Attributes:
    run: its folder.
    config: plain data.
    config_flags: what gives the programs that config.
    steps: of `launch.worker`, in their order.
    store: where activations are; None if the config makes them anew.
    allowed: fields of the config that may change.
    code: the packed tree.
  """

  run: epath.Path
  config: dict[str, Any]
  config_flags: tuple[str, ...]
  steps: tuple[str, ...]
  store: str | None
  allowed: tuple[str, ...]
  code: package.Code

  @property
  def name(self) -> str:
    return self.run.name

  def name_of(self, role: str) -> str:
    """What the machines of a role are called."""
    return f'{self.name}-eval' if role == 'evaluator' else self.name

  def steps_of(self, role: str, *, apart: bool) -> tuple[str, ...]:
    """What a role does; `apart` is whether evaluation is another's."""
    if role == 'evaluator':
      return ('follow',)
    return tuple(s for s in self.steps if not apart or s != 'evaluate')

  def worker_arguments(
    self,
    role: str,
    program_flags: list[str],
    *,
    apart: bool = False,
    notices: bool = False,
    host: int | None = None,
    queued_resource: str | None = None,
  ) -> list[str]:
    """Arguments of `launch.worker`."""
    steps = ','.join(self.steps_of(role, apart=apart))
    found = [f'--run={self.run}', f'--role={role}', f'--steps={steps}']
    if self.store:
      found.append(f'--store={self.store}')
    found += [f'--allow={field}' for field in self.allowed]
    if notices:
      found.append('--notices')
    if host is not None:
      found.append(f'--host={host}')
    if queued_resource:
      found.append(f'--queued_resource={queued_resource}')
    return [*found, '--', *self.config_flags, *program_flags]

  def record(
    self, target: str, roles: tuple[str, ...], request: dict[str, Any]
  ) -> None:
    """Writes what the run is and what is asked for, before it is asked for.

    Raises:
      UserError: the name is taken by another config, or cannot be written to.
    """
    run = self.run
    with identity.storage(run, 'write to'):
      identity.check_config(run, self.config, self.allowed)
      identity.check_free(run, target)
      identity.write_json(run / 'config.json', self.config)
      code = run / 'code' / self.code.id
      if not code.with_suffix('.json').exists():
        about = {
          'commit': self.code.commit,
          'dirty': self.code.dirty,
          'date': identity.now(),
        }
        paths.write_whole(code.with_suffix('.diff'), self.code.diff)
        paths.write_whole(code.with_suffix('.tar.gz'), self.code.archive)
        identity.write_json(code.with_suffix('.json'), about)
      identity.write_json(
        run / 'launch.json',
        {'target': target, 'code': self.code.id, **request},
      )
      identity.begin(run, roles)


def date_of_packages(run: epath.Path) -> str:
  """Of the run's first submission: it goes on with the packages it had."""
  with identity.storage(run, 'read'):
    launch = identity.read_json(run / 'launch.json') or {}
  return launch.get('date') or identity.now()


def asked_before(run: epath.Path, target: str) -> dict[str, Any] | None:
  """What a target was asked for when the run was submitted last, if it was."""
  with identity.storage(run, 'read'):
    launch = identity.read_json(run / 'launch.json')
  return launch if launch and launch['target'] == target else None


def check_hosts(streams: bool, hosts: int) -> None:
  """Refuses many hosts for what runs in one process."""
  if streams and hosts > 1:
    raise UserError(
      f"loader.source: 'stream' runs in one process, and there are {hosts} hosts; "
      'harvest a store, or take a slice of one host'
    )
