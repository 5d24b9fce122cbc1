"""How frontiers compare, with intervals: on curves whose answer is known."""

import numpy as np
import pytest

from gsae_jax.evaluation import frontiers, metrics, pareto, series
from gsae_jax.evaluation.frontiers import Estimate

TOKENS = 100.0


def sums(l0, recovered, rng=None, documents=50):
  """Of an SAE that has this L0 and loss recovered, with noise of documents."""
  noise = lambda: 1 + (0 if rng is None else rng.normal(0, 0.2, documents))
  full = np.full(documents, TOKENS)
  spliced = 3.0 + (1 - recovered) * 2.0
  values = dict.fromkeys((*metrics.OF_SITE, *metrics.OF_SAE), full)
  return values | {
    'ce_clean': 3.0 * full,
    'ce_zero': 5.0 * full,
    'l0': l0 * full * noise(),
    'ce_spliced': full * (3.0 + (spliced - 3.0) * noise()),
  }


def sae(kind, i, l0, recovered, *, seed=0, rng=None):
  member = f'{kind}_{i}_s{seed}'
  measured = sums(l0, recovered, rng)
  record = metrics.record(measured, np.ones(4)) | {
    'member': member, 'architecture': kind, 'variant': '', 'site': 'mlp_out.0',
    'seed': seed, 'l1_coefficient': 0.1, 'tokens_trained': 100, 'features': 4,
    'evaluation': {},
  }  # fmt: skip
  return record, measured


def arms(
  factor=0.5, *, rng=None, seeds=(0,), jitter=0.0, levels=(0.6, 0.7, 0.8, 0.9)
):
  """Both arms' records and sums; ours needs `factor` of their L0 everywhere."""
  found = []
  for kind, scale in (('gated', factor), ('relu', 1.0)):
    for seed in seeds:
      shift = jitter * (0 if rng is None else rng.normal())
      for i, level in enumerate(levels):
        l0 = scale * 10 * 2**i * np.exp(shift)
        found.append(sae(kind, i, l0, level, seed=seed, rng=rng))
  records = [r for r, _ in found]
  return records, {r['member']: measured for r, measured in found}


def compared(records, measured=None):
  resampled = frontiers.replicates(measured) if measured else None
  return pareto.compare(records, 'gated', 'relu', resampled)


@pytest.mark.parametrize('factor', [0.5, 1.6])
def test_a_known_factor_at_every_level(factor):
  found = compared(arms(factor)[0])
  assert found.l0_ratio == Estimate(pytest.approx(factor), None)
  assert found.share.value == (1.0 if factor < 1 else 0.0)
  assert [e.value for e in found.ratios] == pytest.approx([factor] * 21)
  assert (found.levels[0], found.levels[-1]) == pytest.approx((0.6, 0.9))
  # Frontiers rise by 0.1 with each doubling of L0.
  assert found.gap.value == pytest.approx(-0.1 * np.log2(factor))


def test_intervals_hold_the_truth_and_are_tight(rng):
  found = compared(*arms(0.5, rng=rng))
  low, high = found.l0_ratio.interval
  assert low < 0.5 < high and high - low < 0.1
  assert found.share == Estimate(1.0, [1.0, 1.0])
  low, high = found.gap.interval
  assert low < 0.1 < high and high - low < 0.06
  inside = [e.interval[0] < 0.5 < e.interval[1] for e in found.ratios[2:-2]]
  assert np.mean(inside) > 0.8


def test_an_interval_covers_as_often_as_it_says():
  """Of 40 studies, about 38 intervals should hold the truth."""
  covered = 0
  for i in range(40):
    found = compared(*arms(0.5, rng=np.random.default_rng(i)))
    low, high = found.l0_ratio.interval
    covered += low <= 0.5 <= high
  assert 34 <= covered <= 40


def test_documents_are_the_same_for_both_sides():
  """Noise that both sides share does not widen the interval."""
  records, measured = arms(0.5)
  rng = np.random.default_rng(0)
  weight = np.exp(rng.normal(0, 1, 50))
  shared = {
    m: {k: v * weight * (1 + (k == 'l0')) for k, v in s.items()}
    for m, s in measured.items()
  }
  found = compared(records, shared)
  low, high = found.l0_ratio.interval or (0.5, 0.5)
  assert high - low < 1e-9


def test_seeds_are_drawn_too(rng):
  """One seed of three is far off: only drawing seeds can tell."""
  records, measured = arms(0.5, rng=rng, seeds=(0, 1, 2))
  one, two = compared(records, measured), []
  for r in records:
    if r['architecture'] == 'gated' and r['seed'] == 2:
      better = sae('gated', r['member'][6], r['l0'] / 3, r['loss_recovered'],
                   seed=2)  # fmt: skip
      measured[r['member']] = better[1]
      r = r | {'l0': r['l0'] / 3}
    two.append(r)
  wide = compared(two, measured)
  assert np.ptp(one.l0_ratio.interval) < 0.15
  low, high = wide.l0_ratio.interval
  assert low < 0.2 and high > 0.4


def test_what_is_not_defined_is_none(rng):
  records, measured = arms(0.5, rng=rng)
  relu = [r for r in records if r['architecture'] == 'relu']
  assert compared(relu, measured) is None
  apart = [sae('gated', i, 5 + i, 0.1 + 0.1 * i) for i in range(2)]
  assert compared(relu + [r for r, _ in apart]) is None
  # They meet in a sliver that many resamplings lose.
  thin = [
    sae('gated', i, 5 * 2**i, v, rng=rng) for i, v in ((0, 0.3), (1, 0.61))
  ]
  found = compared(
    relu + [r for r, _ in thin],
    measured | {r['member']: s for r, s in thin},
  )
  assert found is not None and found.l0_ratio.interval is None
  # No L0 in common: no vertical gap.
  far = [sae('gated', i, 1 + i, v) for i, v in ((0, 0.6), (1, 0.9))]
  found = compared(relu + [r for r, _ in far])
  assert found.gap is None and found.l0_ratio.value < 0.1


def test_one_document_gives_no_interval():
  records, measured = arms(0.5)
  one = {m: {k: v[:1] for k, v in s.items()} for m, s in measured.items()}
  assert compared(records, one).l0_ratio.interval is None


def test_silent_and_beaten_saes_are_left_out(rng):
  records, measured = arms(0.5, rng=rng)
  before = compared(records, measured)
  silent = sae('gated', 'silent', 0.0, 0.0)
  beaten = sae('gated', 'beaten', 300.0, 0.2)
  more = measured | {r['member']: s for r, s in (silent, beaten)}
  after = compared(records + [silent[0], beaten[0]], more)
  assert after.l0_ratio == before.l0_ratio


def test_bands_hold_the_frontier(rng):
  records, measured = arms(0.5, rng=rng)
  resampled = frontiers.replicates(measured)
  gated = [r for r in records if r['architecture'] == 'gated']
  band = frontiers.band(gated, resampled)
  assert len(band) > 20
  for l0, low, high in band:
    truth = 0.6 + 0.1 * np.log2(l0 / 5)
    assert low - 0.02 < truth < high + 0.02 and low < high
  assert frontiers.band([], resampled) == []
  drawn = series.of_frontiers(records, resampled)
  assert [len(s.band) > 0 for s in drawn] == [True, False, True, False]
  assert not any(s.band for s in series.of_frontiers(records))


def test_summary_and_history_carry_the_interval(rng):
  records, measured = arms(0.5, rng=rng)
  documents = {7: frontiers.replicates(measured)}
  (seen,) = pareto.ratio_history({7: records}, 'mlp_out.0', documents)
  assert seen.tokens == 100 and seen.ratio.interval is not None
  (bare,) = pareto.ratio_history({7: records}, 'mlp_out.0')
  assert bare.ratio == Estimate(seen.ratio.value, None)
  assert f' is {seen.ratio} after' in pareto.summary({7: records}, documents)


def test_estimates_print():
  assert str(Estimate(0.5, None)) == '0.500'
  assert str(Estimate(0.5, [0.4, 0.6])) == '0.500 [0.400, 0.600]'
