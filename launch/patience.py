"""Failures of the moment: said once and borne, while they are few."""

import contextlib
from collections.abc import Iterator

from gsae_jax.errors import UserError

_MOST = 20  # In a row: ten minutes of `watch`.


class Unreachable(UserError):
  """What was asked may answer when it is asked again."""


class Patience:
  """For a loop that must outlive what fails in one of its rounds."""

  def __init__(self):
    self._failures, self._said = 0, None

  @contextlib.contextmanager
  def bear(self) -> Iterator[None]:
    """Ends the block where something is unreachable, and goes on behind it.

    Raises:
      Unreachable: it was so too many times in a row.
    """
    try:
      yield
    except Unreachable as e:
      self._failures += 1
      if self._failures == _MOST:
        raise
      if str(e) != self._said:
        print(f'{e}; asking again', flush=True)
      self._said = str(e)
    else:
      self._failures, self._said = 0, None
