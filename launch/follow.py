"""Follows a run on Cloud TPU, whose machines may be taken away."""

from collections.abc import Callable

from etils import epath

from gsae_jax.errors import UserError
from launch import queued, view
from launch.patience import Patience

# Requests that fail one after the other, without machines in between.
_FAILURES = 5


def follow(
  run: epath.Path,
  launch: dict,
  cloud: queued.Cloud,
  pause: Callable[[], None],
) -> None:
  """Until a run is over; asks again for machines that were taken away.

  Raises:
    UserError: a step failed, or no machines can be had.
  """
  follower = _Follower(run, launch, cloud)
  patience = Patience()
  while True:
    with patience.bear():
      if all([follower.look(role) for role in launch['requests']]):
        view.conclude(run)
        return
    pause()


class _Follower:
  """What there is to remember from one look to the next."""

  def __init__(self, run: epath.Path, launch: dict, cloud: queued.Cloud):
    self._run, self._launch, self._cloud = run, launch, cloud
    self._failures = dict.fromkeys(launch['requests'], 0)
    self._shown = {}

  def look(self, role: str) -> bool:
    """Does what a role needs; returns whether it is over."""
    request = self._launch['requests'][role]
    name = queued.full_name(request)
    state, why = self._cloud.state(name)
    if self._shown.get(role) != state:
      print(f'{role}: machines {state}{why and f" ({why})"}', flush=True)
      self._shown[role] = state
    if state == 'ACTIVE':
      self._failures[role] = 0
    # Asked behind the state: they end before they delete themselves.
    if view.is_over(self._run, role):
      # They may not be allowed to delete themselves.
      if state != queued.ABSENT and not self._launch['keep']:
        self._cloud.delete(name)
      return True
    if state in (*queued.LOST, queued.ABSENT):
      self._failures[role] += state == 'FAILED'
      self._check(role, request, f'{name} failed', why)
      self._cloud.make_room(name)
      self._cloud.create(queued.from_json(request))
      print(f'{role}: asked for again', flush=True)
    return False

  def _check(self, role: str, request: dict, what: str, why: str) -> None:
    failures = self._failures[role]
    if failures and 'queueingPolicy' in request['queuedResource']:
      raise UserError(f'{what} ({why}), or waited for all of --valid_hours')
    if failures == _FAILURES:
      raise UserError(f'{what} {failures} times ({why})')
