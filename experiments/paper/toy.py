r"""The paper's toy model of a thresholded feature (Appendix F, Figure 15).

  python -m experiments.paper.toy --out=toy.html

A feature's activation along its direction is N(2, 1/4) on half of the tokens,
those that have it, and N(0, 1) on the others. An encoder has to keep most of the
latter out, so it needs a threshold near 1; and a ReLU, `1[a > t] m (a - t)`, then
pays on what it lets in: it can be right at one value only. A JumpReLU,
`1[a > t] m (a - d)`, has its offset free of its threshold and is right everywhere
above it. Seconds on one core; no language model, no training.

  t = 1, tokens that have the feature   mean squared error   of it, above t
  ReLU, m = 2 (the paper's)             0.2330               0.2173
  ReLU, m = 1.80 (least squares)        0.1852               0.1695
  JumpReLU, m = 1, d = 0                0.0157               0

The JumpReLU reconstructs perfectly above 1, as the paper says; least squares over
its factor and offset give m = 1, d = 0 at every threshold.
"""

import math
from collections.abc import Sequence

import numpy as np
from absl import flags
from etils import epath

from gsae_jax import paths, program
from gsae_jax.evaluation import figures, page

# Means and standard deviations; a token has the feature with probability 1/2.
ON, OFF = (2.0, 0.5), (0.0, 1.0)

# Threshold, factor and offset.
RELU, JUMPRELU = (1.0, 2.0, 1.0), (1.0, 1.0, 0.0)

_ROWS = 100_000
_THRESHOLDS = (0.0, 0.5, 1.0, 1.5, 2.0)


def sample(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Activations `[n]` float64, and which have the feature, `[n]` bool."""
  rng = np.random.default_rng(seed)
  on_N = rng.random(n) < 0.5
  z_N = rng.normal(size=n)
  return np.where(on_N, ON[0] + ON[1] * z_N, OFF[0] + OFF[1] * z_N), on_N


def encode(a: np.ndarray, t: float, m: float, d: float) -> np.ndarray:
  """`1[a > t] m (a - d)`; `d = t` is a ReLU's."""
  return np.where(a > t, m * (a - d), 0.0)


def moments_above(
  t: float, normal: tuple[float, float] = ON
) -> tuple[float, float, float]:
  """`E[1; a > t]`, `E[a; a > t]` and `E[a^2; a > t]`."""
  mean, std = normal
  z = (t - mean) / std
  above = math.erfc(z / math.sqrt(2)) / 2
  density = std * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
  return (
    above,
    mean * above + density,
    (mean**2 + std**2) * above + (mean + t) * density,
  )


def expected_errors(t: float, m: float, d: float) -> tuple[float, float]:
  """`E (f - a)^2` over tokens that have the feature: all, and the part above t."""
  p, first, second = moments_above(t)
  # f - a = (m - 1) a - m d above t, and -a below.
  above = (m - 1) ** 2 * second - 2 * m * d * (m - 1) * first + (m * d) ** 2 * p
  return above + ON[0] ** 2 + ON[1] ** 2 - second, above


def best_relu(t: float) -> tuple[float, float, float]:
  """Threshold, factor and offset of the least error; only the factor is free."""
  p, first, second = moments_above(t)
  m = (second - t * first) / (second - 2 * t * first + t**2 * p)
  return t, m, t


def best_jumprelu(t: float) -> tuple[float, float, float]:
  """The same with the offset free too, by least squares on `a` and 1."""
  p, first, second = moments_above(t)
  m, c = np.linalg.solve([[second, first], [first, p]], [second, first])
  return t, float(m), float(-c / m)


def results(seed: int = 0) -> dict:
  """The numbers, as plain data.

  Args:
    seed: of the sample, which only `sampled_error` and `largest_error_above`
      are of; all else is exact.

  Returns:
    `relu` and `jumprelu`, the paper's two, with `threshold`, `factor` and
    `offset`; over tokens that have the feature, the mean squared `error`, its
    part `error_above` the threshold, the `sampled_error` and, of any one above
    it, the `largest_error_above`; `missed`, the share of tokens with the
    feature below the threshold, and `false`, of those without it above;
    and `by_threshold`, the best of both for several.
  """
  a_N, on_N = sample(_ROWS, seed)

  def measured(encoder):
    error_N = np.abs(encode(a_N, *encoder) - a_N)
    above_N = on_N & (a_N > encoder[0])
    return _about(encoder) | {
      'sampled_error': float(np.mean(error_N[on_N] ** 2)),
      'largest_error_above': float(np.max(error_N[above_N])),
    }

  return {
    'relu': measured(RELU),
    'jumprelu': measured(JUMPRELU),
    'by_threshold': [
      {
        'threshold': t,
        'relu': _about(best_relu(t)),
        'jumprelu': _about(best_jumprelu(t)),
      }
      for t in _THRESHOLDS
    ],
  }


def _about(encoder: tuple[float, float, float]) -> dict[str, float]:
  t, m, d = encoder
  error, above = expected_errors(*encoder)
  return {
    'threshold': t,
    'factor': m,
    'offset': d,
    'error': error,
    'error_above': above,
    'missed': 1 - moments_above(t, ON)[0],
    'false': moments_above(t, OFF)[0],
  }


def figure(seed: int = 0) -> str:
  """Figure 15 and what follows from it, as HTML in the report's style."""
  a_N, on_N = sample(_ROWS, seed)
  t = RELU[0]
  distributions = [
    _histogram('has the feature', 'other1', a_N[on_N]),
    _histogram('has it not', 'other2', a_N[~on_N]),
    _curve('threshold', 'other7', (t, t), (0.0, 0.85)),
  ]
  grid = np.unique([*np.linspace(-1.0, 4.0, 101), t, np.nextafter(t, 2.0)])
  outputs = [
    _curve('ReLU, t = 1, m = 2', 'relu', grid, encode(grid, *RELU)),
    _curve('JumpReLU, t = 1, m = 1', 'gated', grid, encode(grid, *JUMPRELU)),
    _curve('the value', 'other7', grid, grid, opacity=0.5),
  ]
  ts = np.linspace(-0.5, 2.5, 61)
  errors = [
    _curve(label, style, ts, [expected_errors(*best(t))[0] for t in ts])
    for label, style, best in (
      ('best ReLU', 'relu', best_relu),
      ('best JumpReLU', 'gated', best_jumprelu),
    )
  ]
  frames = [
    page.frame(
      'Activations along the direction',
      f'{_ROWS:,} tokens; most of those without the feature stay below 1.',
      figures.figure(
        distributions,
        x_label='activation',
        y_label='density',
        title='Activations with and without the feature',
      ),
    ),
    page.frame(
      'What the two encoders give',
      'The ReLU is right at 2 alone, the JumpReLU everywhere above 1.',
      figures.figure(
        outputs,
        x_label='activation',
        y_label='output',
        title='Output of both encoders',
      ),
    ),
    page.frame(
      'The best of each kind, for every threshold',
      'Least squares over tokens that have the feature. What is left of the '
      'JumpReLU’s error is of tokens below the threshold.',
      figures.figure(
        errors,
        x_label='threshold',
        y_label='mean squared error',
        title='Error of the best encoders',
      ),
    ),
  ]
  return f'<div class="figures">{"".join(frames)}</div>'


def _curve(
  label: str,
  style: str,
  xs: Sequence[float],
  ys: Sequence[float],
  opacity: float = 1.0,
) -> figures.Series:
  points = [(float(x), float(y), '') for x, y in zip(xs, ys, strict=True)]
  return figures.Series(label, style, points, dots=False, opacity=opacity)


def _histogram(label: str, style: str, a_N: np.ndarray) -> figures.Series:
  edges = np.linspace(-4.0, 5.0, 91)
  density, _ = np.histogram(a_N, edges, density=True)
  # Steps: the height of a bin from its left edge to its right one.
  return _curve(label, style, np.repeat(edges, 2)[1:-1], np.repeat(density, 2))


def render(seed: int = 0) -> str:
  """The whole page."""
  found = results(seed)
  relu, jumprelu = found['relu'], found['jumprelu']
  fitted = best_relu(relu['threshold'])
  lead = (
    f'Over tokens that have the feature, the mean squared error is '
    f'{relu["error"]:.3f} with the ReLU, {expected_errors(*fitted)[0]:.3f} with '
    f'its factor at best ({fitted[1]:.2f}), and {jumprelu["error"]:.3f} with the '
    f'JumpReLU, all of it of the {jumprelu["missed"]:.1%} below the threshold; '
    f'{jumprelu["false"]:.1%} of the other tokens are above it.'
  )
  return page.document(
    'A thresholded feature (Appendix F)',
    '<h1>A thresholded feature</h1>'
    f'<p class="lead">{lead}</p><h2>Figure 15</h2>{figure(seed)}',
  )


def define_flags(values: flags.FlagValues) -> None:
  """Adds the flags of this command."""
  flags.DEFINE_string('out', None, 'The page to write.', flag_values=values)
  flags.mark_flag_as_required('out', values)


def main(given: flags.FlagValues) -> None:
  path = epath.Path(given.out).expanduser()
  paths.write_whole(path, render())
  print(path)


COMMAND = program.Command(define_flags, main)

if __name__ == '__main__':
  COMMAND.run()
