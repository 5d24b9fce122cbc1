"""The toy model of Appendix F: exact numbers against integrals and samples."""

import functools
import html.parser
import json

import numpy as np
import pytest

from experiments.paper import toy
from tests.support.commands import call


def integral(fn, t=-np.inf, mean=2.0, std=0.5):
  """Of `fn` times the density of a normal above t, by the trapezoidal rule."""
  # Steps of 5e-5, with t half way between two points.
  a = np.arange(mean - 10 * std, mean + 10 * std, 1e-4 * std) + 0.5e-4 * std
  density = np.exp(-(((a - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))
  return np.sum(np.where(a > t, fn(a) * density, 0)) * 1e-4 * std


@pytest.mark.parametrize('t', [-1.0, 0.0, 1.0, 2.3])
@pytest.mark.parametrize('normal', [toy.ON, toy.OFF])
def test_moments_are_the_integrals(t, normal):
  want = [integral(lambda a, n=n: a**n, t, *normal) for n in (0, 1, 2)]
  np.testing.assert_allclose(toy.moments_above(t, normal), want, atol=1e-7)


@pytest.mark.parametrize(
  'encoder', [toy.RELU, toy.JUMPRELU, (0.5, 1.4, 0.2), (2.0, 0.8, 2.0)]
)
def test_errors_are_the_integrals(encoder):
  error = lambda a: (toy.encode(a, *encoder) - a) ** 2
  want = integral(error), integral(error, encoder[0])
  np.testing.assert_allclose(toy.expected_errors(*encoder), want, atol=1e-7)


@pytest.mark.parametrize('t', [0.3, 1.0, 1.8])
def test_the_best_are_the_best(t):
  for best, free in ((toy.best_relu, (1,)), (toy.best_jumprelu, (1, 2))):
    found = best(t)
    least, _ = toy.expected_errors(*found)
    for i in free:
      for step in (-0.01, 0.01):
        other = [v + step * (i == j) for j, v in enumerate(found)]
        assert toy.expected_errors(*other)[0] > least + 1e-5
  assert toy.best_relu(t)[0] == toy.best_relu(t)[2] == t
  np.testing.assert_allclose(toy.best_jumprelu(t), (t, 1, 0), atol=1e-9)


def test_the_sample_is_of_the_model():
  a, on = toy.sample(200_000, 3)
  assert abs(on.mean() - 0.5) < 0.005
  for part, (mean, std) in ((a[on], toy.ON), (a[~on], toy.OFF)):
    assert abs(part.mean() - mean) < 0.01 * std
    assert abs(part.std() - std) < 0.01 * std
  again, _ = toy.sample(200_000, 3)
  np.testing.assert_array_equal(again, a)
  assert not np.array_equal(toy.sample(200_000, 4)[0], a)


def test_the_encoders_of_the_figure():
  a = np.array([-1.0, 0.5, 1.0, 1.5, 2.0, 3.0])
  np.testing.assert_array_equal(toy.encode(a, *toy.RELU), [0, 0, 0, 1, 2, 4])
  np.testing.assert_array_equal(
    toy.encode(a, *toy.JUMPRELU), [0, 0, 0, 1.5, 2, 3]
  )


def test_jumprelu_reconstructs_perfectly_above_1():
  found = toy.results()
  json.dumps(found)
  relu, jumprelu = found['relu'], found['jumprelu']
  assert jumprelu['largest_error_above'] == jumprelu['error_above'] == 0
  # What the module's own text says.
  assert f'{relu["error"]:.4f} {relu["error_above"]:.4f}' == '0.2330 0.2173'
  assert f'{jumprelu["error"]:.4f}' == '0.0157'
  for r in (relu, jumprelu):
    assert abs(r['sampled_error'] - r['error']) < 0.02 * relu['error']
    assert f'{r["missed"]:.4f} {r["false"]:.4f}' == '0.0228 0.1587'
  other = toy.results(seed=3)
  assert other['relu']['sampled_error'] != relu['sampled_error']
  assert other['relu']['error'] == relu['error']
  # 2 (a - 1) - a of the largest activation that is the feature's.
  a, on = toy.sample(100_000, 3)
  assert a[~on].max() > a[on].max()
  largest = other['relu']['largest_error_above']
  assert largest == pytest.approx(a[on].max() - 2)


def test_no_relu_does_as_well_at_any_threshold():
  rows = toy.results()['by_threshold']
  assert [r['threshold'] for r in rows] == [0, 0.5, 1, 1.5, 2]
  at_1 = rows[2]['relu']
  assert f'{at_1["factor"]:.2f} {at_1["error"]:.4f}' == '1.80 0.1852'
  assert f'{at_1["error_above"]:.4f}' == '0.1695'
  for r in rows:
    assert abs(r['jumprelu']['error_above']) < 1e-12
    assert r['jumprelu']['factor'] == pytest.approx(1)
  # At 0 a ReLU has the right offset, and half of the other tokens fire.
  assert rows[0]['relu']['error'] == pytest.approx(rows[0]['jumprelu']['error'])
  assert rows[0]['relu']['false'] == pytest.approx(0.5)
  for r in rows[1:]:
    assert r['relu']['error'] > r['jumprelu']['error'] + 0.02


def test_histograms_are_densities():
  a, _ = toy.sample(10_000, 0)
  series = toy._histogram('all', 'gated', a)
  x, y, _ = zip(*series.points, strict=True)
  assert np.trapezoid(y, x) == pytest.approx(1, abs=1e-3)
  assert x[0] == -4 and x[-1] == 5 and len(x) == 180


@pytest.mark.integration
def test_the_command_writes_one_page(tmp_path):
  run = functools.partial(call, 'toy', package='experiments.paper', config=None)
  path = tmp_path / 'out' / 'toy.html'
  code, out, _ = run(f'--out={path}')
  assert code == 0 and out == f'{path}\n'
  page = path.read_text()
  html.parser.HTMLParser().feed(page)
  assert page.count('<svg') == toy.figure().count('<svg') == 3
  assert '0.233 with the ReLU, 0.185 with its factor at best (1.80)' in page
  assert 'http' not in page.replace('http-equiv', '')
  (tmp_path / 'file').write_text('')
  code, _, err = run(f'--out={tmp_path}/file/toy.html')
  assert code == 1
  assert err.startswith('error: ') and err.count('\n') == 1
