"""When a claim holds, does not, or is undecided: rules on intervals.

An estimate without an interval decides nothing.
"""

from collections.abc import Sequence

from gsae_jax.evaluation.frontiers import Estimate

HOLDS = 'holds'
FAILS = 'does not hold'
UNDECIDED = 'undecided'
UNTESTED = 'not tested here'


def below(estimate: Estimate | None, bound: float) -> str:
  """Whether all of the interval is at the bound or below, or all is above."""
  if estimate is None or estimate.interval is None:
    return UNDECIDED
  low, high = estimate.interval
  return HOLDS if high <= bound else FAILS if low > bound else UNDECIDED


def above(estimate: Estimate | None, bound: float) -> str:
  """Whether all of the interval is at the bound or above, or all is below."""
  if estimate is None or estimate.interval is None:
    return UNDECIDED
  low, high = estimate.interval
  return HOLDS if low >= bound else FAILS if high < bound else UNDECIDED


def within(estimates: Sequence[Estimate], low: float, high: float) -> str:
  """Whether every interval lies between the bounds, or one wholly outside."""
  intervals = [e.interval for e in estimates]
  if any(i and (i[1] < low or i[0] > high) for i in intervals):
    return FAILS
  inside = [i and low <= i[0] and i[1] <= high for i in intervals]
  return HOLDS if inside and all(inside) else UNDECIDED


def both(verdicts: Sequence[str]) -> str:
  """Of a claim that has parts: all must hold, and one that fails is enough."""
  if FAILS in verdicts:
    return FAILS
  return HOLDS if set(verdicts) == {HOLDS} else UNDECIDED


def counted(is_so: bool) -> str:
  """Of what is counted and not estimated."""
  return HOLDS if is_so else FAILS
