"""Host work beside device work: an iterator that is one item ahead."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

_END = object()
_WAIT = 0.2  # Seconds between two ticks.


class _Next(threading.Thread):
  """Takes one item from an iterator."""

  def __init__(self, items: Iterator[Any]):
    super().__init__(name='text')
    self._items = items
    self._item: Any = None
    self._error: BaseException | None = None
    self.start()

  def run(self):
    try:
      self._item = next(self._items, _END)
    except BaseException as e:  # For whoever waits for the item.
      self._error = e

  def result(self, tick: Callable[[], None]) -> Any:
    while self.is_alive():
      self.join(_WAIT)
      tick()
    if self._error is not None:
      raise self._error
    return self._item


def ahead(
  make: Callable[[Callable[[], bool]], Iterator[Any]],
  tick: Callable[[], None] = lambda: None,
) -> Iterator[Any]:
  """Yields items that another thread makes, one ahead of the last that was taken.

  The thread ends when the iterator is closed or forgotten.

  Args:
    make: returns the iterator of the items. It is given a function that says
      whether nobody waits for them any more, so that making one can be left.
    tick: called while an item is waited for; may raise, to leave.
  """
  left = threading.Event()
  # A program that ends waits for its threads.
  unwanted = lambda: left.is_set() or not threading.main_thread().is_alive()
  items = make(unwanted)
  task = _Next(items)
  try:
    while (item := task.result(tick)) is not _END:
      task = _Next(items)
      yield item
  finally:
    left.set()
    task.join()
