"""One trial of a campaign."""

import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class Trial:
  """What a campaign's test draws from.

  Attributes:
    seed: of the whole run, `--campaign-seed`.
    test: the test's name.
    index: the trial's number, from 0.
  """

  seed: str
  test: str
  index: int

  def rng(self) -> np.random.Generator:
    """Returns a generator whose draws depend on the three attributes alone."""
    text = f'{self.seed}/{self.test}/{self.index}'
    return np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))

  def __str__(self) -> str:
    return f'trial {self.index} of seed {self.seed!r}'
