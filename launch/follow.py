"""Follows a run on Cloud TPU, whose machines may be taken away."""

from collections.abc import Callable

from etils import epath

from gsae_jax.errors import UserError
from launch import identity, queued, view
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
    UserError: a step failed, no machines can be had, or the run was submitted
      again meanwhile.
  """
  follower = _Follower(run, launch, cloud)
  patience = Patience()
  while True:
    with patience.bear():
      follower.check_launch()
      if all([follower.look(role) for role in launch['requests']]):
        view.conclude(run)
        return
    pause()


class _Follower:
  """What there is to remember from one look to the next."""

  def __init__(self, run: epath.Path, launch: dict, cloud: queued.Cloud):
    self._run, self._launch, self._cloud = run, launch, cloud
    self._failures = dict.fromkeys(launch['requests'], 0)
    self._shown: dict[str, str] = {}

  def check_launch(self) -> None:
    """Ends this watch when the run was submitted again for other machines.

    Between a look at the state and a request the run may be deleted and
    submitted elsewhere. What was asked for then belongs to nobody: it is deleted.

    Raises:
      UserError: it was submitted again.
    """
    with identity.storage(self._run, 'read'):
      now = identity.read_json(self._run / 'launch.json')
    if now is None or now == self._launch:
      return
    theirs = {queued.full_name(r) for r in now.get('requests', {}).values()}
    for request in self._launch['requests'].values():
      name = queued.full_name(request)
      if name not in theirs:
        self._cloud.delete(name)
    raise UserError(
      f'--run: {self._run.name} was submitted again; watch it anew'
    )

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
    with identity.storage(self._run, 'read'):
      about = identity.told(self._run).get(role, {})
    if about.get('state') in identity.OVER:
      # They may not be allowed to delete themselves. Of a deleted run nothing is
      # kept: this watch may have asked for machines in the same moment.
      keep = self._launch['keep'] and about['state'] != 'deleted'
      if state != queued.ABSENT and not keep:
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
