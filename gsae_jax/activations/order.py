"""Permutations that are computed, not stored: a shuffle of any size in no memory."""

import numpy as np

_ROUNDS = 6
_FEW = (
  2**16
)  # Numbers that are permuted in memory: of few, networks know few orders.


class Shuffle:
  """A permutation of `range(n)`, a function of `n` and the key.

  Of many numbers, a Feistel network over the next power of four, walked until
  it lands inside.
  """

  def __init__(self, n: int, *key: int):
    """Draws the round keys.

    Args:
      n: how many numbers.
      *key: non-negative integers.
    """
    self.n = n
    rng = np.random.default_rng(key)
    self._places = rng.permutation(n) if n <= _FEW else None
    self._half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    self._mask = np.uint64((1 << int(self._half)) - 1)
    self._keys = rng.integers(2**64, size=_ROUNDS, dtype=np.uint64)

  def __call__(self, numbers: np.ndarray) -> np.ndarray:
    """Where each of the numbers, all below `n`, goes; int64."""
    if self._places is not None:
      return self._places[numbers]
    x = self._cipher(np.asarray(numbers, np.uint64))
    while (outside := x >= self.n).any():
      x[outside] = self._cipher(x[outside])
    return x.astype(np.int64)

  def _cipher(self, x: np.ndarray) -> np.ndarray:
    left, right = x >> self._half, x & self._mask
    for key in self._keys:
      left, right = right, left ^ (_mix(right ^ key) & self._mask)
    return (left << self._half) | right


def _mix(x: np.ndarray) -> np.ndarray:
  """The finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
