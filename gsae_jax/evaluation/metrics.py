"""From sums over documents to the numbers of a record.

Every metric is a ratio of sums over all tokens, added up in float64 on the host,
never a mean of per-batch ratios (paper section 4). Sums are kept for each document,
so that any statistic can be had for a resampling of them.
"""

from collections.abc import Mapping

import numpy as np

from gsae_jax import density
from gsae_jax.evaluation import bootstrap

Sums = Mapping[str, np.ndarray]

# What is summed over a document's tokens: `predictions` and cross-entropies over
# those that are predicted from, the rest over those in the mask.
OF_SITE = (
  'predictions', 'tokens', 'variance',
  'ce_clean', 'ce_zero', 'kl_zero', 'ce_mean', 'kl_mean',
)  # fmt: skip
OF_SAE = (
  'ce_spliced', 'kl_spliced', 'l0', 'error', 'x_hat_squared', 'dot', 'cosine',
)  # fmt: skip

# Features that fire on more of the tokens are as good as biases.
DENSE = 0.1


def ratios(sums: Sums) -> dict[str, np.ndarray]:
  """The metrics, NaN or infinite where they are not defined.

  Args:
    sums: `OF_SITE` and `OF_SAE`, all of one shape: of all documents together, or
      `[R]` of R resamplings.

  Returns:
    fields of an evaluation record (docs/evaluate.md), of the same shape;
    cross-entropies and divergences in nats per prediction, squared norms in the
    activations' own units.
  """
  predictions, tokens = sums['predictions'], sums['tokens']
  with np.errstate(divide='ignore', invalid='ignore'):
    ce = {
      name: sums[f'ce_{name}'] / predictions
      for name in ('clean', 'spliced', 'zero', 'mean')
    }
    recovered = {
      name: (ce[name] - ce['spliced']) / (ce[name] - ce['clean'])
      for name in ('zero', 'mean')
    }
    return {
      'l0': sums['l0'] / tokens,
      # Eq. 5: 0 for a reconstruction of zeros, 1 for a perfect one.
      'loss_recovered': recovered['zero'],
      'loss_recovered_mean_ablation': recovered['mean'],
      # Where zeros destroy the model, as in its residual stream, all SAEs recover
      # nearly everything; this tells them apart.
      'log_loss_unrecovered': np.log(1 - recovered['zero']),
      'ce_clean': ce['clean'],
      'ce_spliced': ce['spliced'],
      'ce_zero_ablation': ce['zero'],
      'ce_mean_ablation': ce['mean'],
      'kl_clean_spliced': sums['kl_spliced'] / predictions,
      'kl_zero_ablation': sums['kl_zero'] / predictions,
      'kl_mean_ablation': sums['kl_mean'] / predictions,
      # Eq. 9, in the paper's second version.
      'gamma': np.divide(sums['x_hat_squared'], sums['dot']),
      'explained_variance': 1 - sums['error'] / sums['variance'],
      'mse': sums['error'] / tokens,
      'cosine': sums['cosine'] / tokens,
    }


def record(sums: Sums, fired_F: np.ndarray) -> dict:
  """The measured part of an evaluation record.

  Args:
    sums: `OF_SITE` and `OF_SAE`, `[documents]` each.
    fired_F: tokens that each feature fired on.

  Returns:
    `ratios` of all documents, with what is undefined, such as the gamma of a
    silent SAE, as None, because JSON has no NaN; how often features fire; and
    `intervals`, a 95 % bootstrap interval over documents of each ratio.
  """
  totals = {name: np.sum(values, -1) for name, values in sums.items()}
  tokens = int(totals['tokens'])
  return {
    **{
      name: float(value) if np.isfinite(value) else None
      for name, value in ratios(totals).items()
    },
    'alive_fraction': float(np.mean(fired_F > 0)),
    'dead_features': int(np.sum(fired_F == 0)),
    'dense_features': int(np.sum(fired_F > DENSE * tokens)),
    'density': density.histogram(fired_F, tokens),
    'num_tokens': tokens,
    'num_documents': int(np.sum(sums['tokens'] > 0)),
    'intervals': intervals(sums),
  }


def intervals(sums: Sums) -> dict[str, list[float] | None]:
  """Of each ratio, where it lies for 95 % of resamplings of the documents."""
  resampled = bootstrap.resample(sums)
  return {
    name: bootstrap.interval(values)
    for name, values in ratios(resampled).items()
  }
