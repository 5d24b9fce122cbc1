"""Threads that take turns, so that draws alone say in which order things happen."""

import threading

from tests.campaigns.damages import pick


class _Over(BaseException):
  """Ends an actor; no handler of errors takes it for one."""


class Turns:
  """Runs one actor at a time; at each pause another one may go on."""

  def __init__(self, rng):
    """Takes the generator that says who goes on."""
    self._rng = rng
    self._actors: dict[str, threading.Semaphore] = {}
    self._mine = threading.local()
    self._back = threading.Semaphore(0)
    self._over = False
    self._errors: list[BaseException] = []

  def add(self, name: str, act) -> None:
    """Adds an actor, which first waits for its turn."""
    go = self._actors[name] = threading.Semaphore(0)

    def body():
      self._mine.go = go
      go.acquire()
      try:
        if not self._over:
          act()
      except _Over:
        pass
      except BaseException as e:
        self._errors.append(e)
      del self._actors[name]
      self._back.release()

    threading.Thread(target=body, daemon=True).start()

  def pause(self, *unused) -> None:
    """Lets the others go on; does nothing outside of an actor."""
    go = getattr(self._mine, 'go', None)
    if go is None:
      return
    self._back.release()
    go.acquire()
    if self._over:
      raise _Over

  def is_alone(self) -> bool:
    """Whether the actor that asks is the last."""
    return len(self._actors) == 1

  def run(self, most: int) -> None:
    """Gives turns until every actor has ended.

    Raises:
      AssertionError: some have not after so many turns.
    """
    for _ in range(most):
      if not self._actors or self._errors:
        break
      self._give(pick(self._rng, sorted(self._actors)))
    left = sorted(self._actors)
    self._over = True
    for name in left:
      self._give(name)
    for error in self._errors:
      raise error
    assert not left, f'{", ".join(left)} did not end in {most} turns'

  def _give(self, name: str) -> None:
    self._actors[name].release()
    self._back.acquire()
