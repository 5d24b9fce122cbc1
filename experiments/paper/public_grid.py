"""The paper's recipe for models that it does not have, on one GPU.

The coefficients are those of adamkarvonen/dictionary_learning_demo
(demo_config.py), in whose units activations have E||x||^2 = 1 and squared errors
are sums. In about these units the paper's baselines at residual sites have 0.018
to 0.13 (Pythia-2.8B) and 0.006 to 0.37 (Gemma-7B): the tables' coefficient times
the width.
"""

from collections.abc import Sequence
from typing import Any

import ml_collections

from experiments.paper import recipe

L1 = {
  'gated': (0.012, 0.018, 0.024, 0.04, 0.06, 0.08),
  'relu': (0.012, 0.015, 0.02, 0.03, 0.04, 0.06),
}


def one_gpu(
  c: ml_collections.ConfigDict, family: str
) -> ml_collections.ConfigDict:
  """The recipe, a sixth to an eighth as long, with the schedules of that grid.

  Args:
    c: a whole config.
    family: whose learning rates, see `recipe.paper`.
  """
  recipe.accelerator(recipe.paper(c, family))
  c.train.steps = 50_000  # 205 M activations.
  c.train.normalize = 'mean_squared_norm'
  c.train.loss_scale = 'sum'
  # As where the grid is from: the penalty rises over 5000 steps, and the rate
  # falls over the last fifth.
  c.train.l1_warmup_steps = 5_000
  c.train.decay_steps = c.train.get_ref('steps') // 5
  # The first two of the recipe's four, at half the time.
  c.train.resample_steps = (12_500, 25_000)
  c.train.dead_after = 6_250
  c.train.checkpoint_every = 5_000
  c.store.tokens = 2**25
  return c


def members(
  sites: Sequence[str], features: int, family: str
) -> tuple[dict[str, Any], ...]:
  """Both arms of the grid at every site.

  Args:
    sites: names.
    features: of Gated; the baseline has half as many again.
    family: whose learning rates.
  """
  widths = {'gated': features, 'relu': int(features * recipe.WIDER_BASELINE)}
  return tuple(
    recipe.member(
      architecture,
      family,
      name=f'{architecture}_{site}_{l1:g}',
      site=site,
      features=widths[architecture],
      l1=l1,
      loss_scale='sum',
    )
    for site in sites
    for architecture, coefficients in L1.items()
    for l1 in coefficients
  )
