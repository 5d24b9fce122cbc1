r"""GPT-2 small, layer 8 of 12: Gated against baseline SAEs on one GPU.

resid_post.8 or mlp_out.8 (D = 768), Gated of 24,576 features against baselines of
36,864, contexts of 128, six coefficients each: 12 SAEs a site.

  C=experiments/gpt2_small.py     # resid_post.8, or $C:mlp_out.8, $C:all
  python -m gsae_jax.harvest  --config=$C --store=DIR
  python -m gsae_jax.train    --config=$C --store=DIR --workdir=DIR
  python -m gsae_jax.evaluate --config=$C --workdir=DIR
  python -m gsae_jax.report   --workdir=DIR

Takes: not measured. Estimate for a site, on a GPU with 165 TFLOP/s of bfloat16 of
which 40 % are reached: 2.8 h of training (1.3e13 operations per step, 50,000 steps),
on an H200 36 min. Stacked, the Gated ones want about 20 GB;
--config.train.members=looped, about 10 GB. The store is of 2**25 rows, 52 GB a site,
of which the 205 M activations of training are 6.1 passes. The text is FineWeb's
sample, not the model's own.

Gives: no L0 measured yet. The learning rates are those of the paper's Pythia-2.8B.
"""

import ml_collections

from experiments import quickstart
from experiments.paper import public_grid, recipe
from experiments.paper.choose import choose

SITES = ('resid_post.8', 'mlp_out.8')


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The config.

  Args:
    arg: which of the SAEs; see `paper/choose.py`.
  """
  c = public_grid.one_gpu(quickstart.get_config(), 'pythia')
  c.lm.path = 'openai-community/gpt2'
  recipe.hub_text(
    c, 'HuggingFaceFW/fineweb', context_length=128, subset='sample-10BT'
  )
  members = public_grid.members(SITES, 24_576, 'pythia')
  return choose(c, arg, members, default='resid_post.8')
