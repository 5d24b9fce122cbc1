"""The order of contexts: permuted in windows, found by the rows they hold."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from gsae_jax.lm.contexts import Contexts


@dataclasses.dataclass(frozen=True)
class Window:
  """Consecutive contexts of the text, permuted together.

  Attributes:
    contexts: in the order of the text.
    first_context: number in the text of the first of them.
    first_row: rows that the windows before hold.
    order_C: the permutation.
    ends_C: rows up to and with each context, in the order of `order_C`.
  """

  contexts: Contexts
  first_context: int
  first_row: int
  order_C: np.ndarray
  ends_C: np.ndarray

  @property
  def end_row(self) -> int:
    return self.first_row + int(self.ends_C[-1])

  def holding(self, start: int, stop: int) -> tuple[np.ndarray, slice]:
    """Contexts that hold rows `start` to `stop` of the window, in order.

    Also which of their rows those are: the first context may begin before
    `start`, and the last end behind `stop`.
    """
    first = int(np.searchsorted(self.ends_C, start, side='right'))
    last = int(np.searchsorted(self.ends_C, stop, side='left'))
    before = int(self.ends_C[first - 1]) if first else 0
    return self.order_C[first : last + 1], slice(start - before, stop - before)


def _permuted(
  text: Iterable[Contexts], seed: int, epoch: int
) -> Iterator[Window]:
  first_context = first_row = 0
  for number, contexts in enumerate(text):
    # NumPy pads what seeds a generator with zeros: that of the first window is
    # the one of (seed, 0, epoch).
    order = np.random.default_rng((seed, 0, epoch, number))
    order_C = order.permutation(len(contexts))
    ends_C = np.cumsum(contexts.counted()[order_C])
    window = Window(contexts, first_context, first_row, order_C, ends_C)
    first_context += len(contexts)
    first_row = window.end_row
    yield window


class Windows:
  """The windows of a text, one at a time.

  Going forward reads what lies between, going back begins the text anew.
  """

  def __init__(self, text: Iterable[Contexts], seed: int, epoch: int):
    """Makes the first window.

    Args:
      text: the contexts, window by window; each iteration is from the first.
      seed: of the orders.
      epoch: each has orders of its own.
    """
    self._text = text
    self._seed = seed
    self.restart(epoch)

  def restart(self, epoch: int) -> None:
    self.close()
    self._epoch = epoch
    self._made = _permuted(self._text, self._seed, epoch)
    self.current = next(self._made)

  def rewind(self) -> None:
    """Goes back to the first window."""
    if self.current.first_row:
      self.restart(self._epoch)

  def close(self) -> None:
    """Leaves the window that is being made."""
    self._made = iter(())

  def covering(
    self, start: int, stop: int, tick: Callable[[], None]
  ) -> Iterator[Window]:
    """Yields the windows that hold rows `start` to `stop` of the text.

    Args:
      start: the first row.
      stop: the row behind the last.
      tick: called before each window is made; may raise, to leave.
    """
    if start < self.current.first_row:
      self.rewind()
    while True:
      if self.current.end_row > start:
        yield self.current
      if self.current.end_row >= stop:
        return
      tick()
      self.current = next(self._made)
