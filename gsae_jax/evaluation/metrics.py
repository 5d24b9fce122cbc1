"""From sums over the evaluation set to the numbers of a record.

Every metric is a ratio of sums over all tokens, accumulated in float64 on the
host, never a mean of per-batch ratios (paper section 4).
"""

from collections.abc import Mapping

import numpy as np

Sums = Mapping[str, np.ndarray]


class Accumulator:
  """Adds batches of named sums in float64."""

  def __init__(self):
    self.sums: dict[str, np.ndarray] = {}

  def add(self, sums: Sums) -> None:
    for name, value in sums.items():
      value = np.asarray(value, np.float64)
      self.sums[name] = self.sums.get(name, 0.0) + value


def record(clean: Sums, zero: Sums, spliced: Sums) -> dict[str, float]:
  """The metrics of one SAE.

  Args:
    clean: `ce` and `predictions`, of the unchanged model.
    zero: `ce`, with the site set to zero.
    spliced: `ce` and `kl` with the reconstruction in place; `l0`, `error`,
      `x_squared`, `x_hat_squared`, `dot`, `cosine`, `tokens` over the rows,
      `x` `[D]`, `fired` `[F]`.

  Returns:
    the fields of an evaluation record (docs/evaluate.md); cross-entropies and
    the divergence in nats per prediction, squared norms in the activations' own
    units.
  """
  with np.errstate(divide='ignore', invalid='ignore'):
    values = _ratios(clean, zero, spliced)
  # What is undefined, such as the gamma of an SAE that is silent, is null: a
  # record is JSON, which has no NaN.
  out = {k: float(v) if np.isfinite(v) else None for k, v in values.items()}
  return out | {'num_tokens': int(spliced['tokens'])}


def _ratios(clean: Sums, zero: Sums, spliced: Sums) -> dict[str, np.ndarray]:
  predictions = clean['predictions']
  tokens = spliced['tokens']
  ce_clean = clean['ce'] / predictions
  ce_zero = zero['ce'] / predictions
  ce_spliced = spliced['ce'] / predictions
  mean_squared = (spliced['x'] ** 2).sum() / tokens**2
  variance = spliced['x_squared'] / tokens - mean_squared
  mse = spliced['error'] / tokens
  return {
    'l0': spliced['l0'] / tokens,
    # Eq. 5: 0 for a reconstruction of zeros, 1 for a perfect one.
    'loss_recovered': (ce_zero - ce_spliced) / (ce_zero - ce_clean),
    'ce_clean': ce_clean,
    'ce_spliced': ce_spliced,
    'ce_zero_ablation': ce_zero,
    'kl_clean_spliced': spliced['kl'] / predictions,
    # Eq. 9, in the paper's second version.
    'gamma': np.divide(spliced['x_hat_squared'], spliced['dot']),
    'explained_variance': 1 - mse / variance,
    'mse': mse,
    'cosine': spliced['cosine'] / tokens,
    'alive_fraction': (spliced['fired'] > 0).mean(),
  }
