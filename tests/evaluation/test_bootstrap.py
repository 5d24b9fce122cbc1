"""Intervals over documents: what they are, and that they hold the truth."""

import numpy as np

from gsae_jax.evaluation import bootstrap, metrics


def sums(rng, documents, recovered=0.9):
  """Of documents of different lengths, about a true loss recovered."""
  n = rng.integers(50, 150, documents).astype(np.float64)
  noise = lambda: rng.normal(size=documents) * 0.2
  of = lambda value: n * (value + noise())
  values = dict.fromkeys((*metrics.OF_SITE, *metrics.OF_SAE), n)
  return values | {
    'ce_clean': of(2.0),
    'ce_zero': of(6.0),
    'ce_spliced': of(6.0 - 4.0 * recovered),
    'l0': of(20.0),
  }


def test_replicates_are_ratios_of_sums_over_drawn_documents(rng):
  values = sums(rng, 7)
  draws = bootstrap.draws(7)
  assert draws.shape == (1000, 7) and set(draws.sum(1)) == {7.0}
  resampled = metrics.ratios(bootstrap.resample(values))
  picked = np.repeat(np.arange(7), draws[3].astype(int))
  again = metrics.ratios({k: v[picked].sum() for k, v in values.items()})
  for name in ('l0', 'loss_recovered', 'ce_clean'):
    np.testing.assert_allclose(resampled[name][3], again[name], rtol=1e-12)
  # The same draws for every SAE: what they share, they share in each.
  np.testing.assert_array_equal(draws, bootstrap.draws(7))


def test_about_95_of_100_intervals_hold_the_truth(rng):
  held = 0
  for _ in range(200):
    low, high = metrics.intervals(sums(rng, 40))['loss_recovered']
    held += low < 0.9 < high
  assert 180 <= held <= 199


def test_intervals_narrow_with_more_documents(rng):
  width = {n: np.ptp(metrics.intervals(sums(rng, n))['l0']) for n in (20, 2000)}
  np.testing.assert_allclose(width[20] / width[2000], 10, rtol=0.5)


def test_what_is_undefined_has_no_interval(rng):
  values = sums(rng, 5)
  found = metrics.intervals(values | {'dot': np.zeros(5)})
  assert found['gamma'] is None and found['l0'] is not None
  one = {k: v[:1] for k, v in values.items()}
  assert set(metrics.intervals(one).values()) == {None}
  assert bootstrap.interval(np.array([np.nan, *range(19)])) is not None
  assert bootstrap.interval(np.array([np.nan, np.nan, *range(18)])) is None
  low, high = bootstrap.interval(np.arange(101.0))
  np.testing.assert_allclose((low, high), (2.5, 97.5))
