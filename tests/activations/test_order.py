"""Computed permutations: one to one, different by key, without a pattern."""

import numpy as np
import pytest

from gsae_jax.activations.order import Shuffle


@pytest.mark.parametrize('n', [1, 2, 3, 1000, 65_536, 65_537, 262_144, 262_145])
def test_every_number_has_a_place_of_its_own(n):
  for key in ((0, 0), (0, 1), (7, 3)):
    places = Shuffle(n, *key)(np.arange(n))
    np.testing.assert_array_equal(np.sort(places), np.arange(n))


def test_it_is_a_function_of_its_key_and_of_nothing_else():
  n = 70_000
  whole = Shuffle(n, 1, 2)(np.arange(n))
  np.testing.assert_array_equal(
    Shuffle(n, 1, 2)(np.arange(50, 90)), whole[50:90]
  )
  for other in ((1, 3), (2, 2)):
    assert np.mean(Shuffle(n, *other)(np.arange(n)) == whole) < 0.01


def test_all_orders_of_few_are_as_likely():
  orders = [tuple(Shuffle(4, 0, k)(np.arange(4)).tolist()) for k in range(4800)]
  counts = np.unique(orders, axis=0, return_counts=True)[1]
  assert len(counts) == 24
  # Chi-square of 23 degrees of freedom: 60 is beyond a millionth.
  assert np.sum((counts - 200) ** 2 / 200) < 60


def test_neighbours_are_strangers():
  n = 100_000
  places = Shuffle(n, 0, 0)(np.arange(n))
  assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.02
  assert abs(np.corrcoef(places, np.arange(n))[0, 1]) < 0.02
  # Gaps in a sample are those of a draw without replacement: exponential.
  gaps = np.diff(np.sort(places[:1000])) / 100
  assert 0.9 < gaps.mean() < 1.1 and 0.9 < gaps.std() < 1.1


def test_large_ranges_need_no_memory():
  n = 10**15 + 7
  places = Shuffle(n, 3)(np.array([0, 1, n - 1]))
  assert len(set(places.tolist())) == 3 and (places < n).all()
