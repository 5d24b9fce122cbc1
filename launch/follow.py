"""Follows a run on Cloud TPU, whose machines may be taken away."""

from collections.abc import Callable

from etils import epath

from gsae_jax.errors import UserError
from launch import queued, view

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
  failures = dict.fromkeys(launch['requests'], 0)
  shown = {}
  while True:
    over = set()
    for role, request in launch['requests'].items():
      name = queued.full_name(request)
      state, why = cloud.state(name)
      if shown.get(role) != state:
        print(f'{role}: machines {state}{why and f" ({why})"}', flush=True)
        shown[role] = state
      if state == 'ACTIVE':
        failures[role] = 0
      # Asked behind the state: they end before they delete themselves.
      if view.is_over(run, role):
        over.add(role)
      elif state in (*queued.LOST, queued.ABSENT):
        failures[role] += state == 'FAILED'
        if failures[role] == _FAILURES:
          raise UserError(f'{name} failed {_FAILURES} times ({why})')
        cloud.make_room(name)
        cloud.create(queued.from_json(request))
        print(f'{role}: asked for again', flush=True)
    if len(over) == len(launch['requests']):
      if not launch['keep']:  # They may not be allowed to delete themselves.
        for request in launch['requests'].values():
          cloud.delete(queued.full_name(request))
      view.conclude(run)
      return
    pause()
