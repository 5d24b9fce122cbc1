r"""Gemma-2-2B, layer 12 of 26: Gated against baseline SAEs on one GPU.

resid_post.12, mlp_out.12 (D = 2304) or attn_pre_linear.12 (8 heads of 256,
D = 2048), Gated of 16,384 features against baselines of 24,576, contexts of 1024,
six coefficients each: 12 SAEs a site.

  C=experiments/gemma_2_2b.py     # resid_post.12, or $C:mlp_out.12, $C:gated
  python -m gsae_jax.harvest  --config=$C --store=DIR
  python -m gsae_jax.train    --config=$C --store=DIR --workdir=DIR
  python -m gsae_jax.evaluate --config=$C --workdir=DIR
  python -m gsae_jax.report   --workdir=DIR

Takes: not measured. Estimate for a site, on a GPU of 24 GB with 165 TFLOP/s of
bfloat16 of which 40 % are reached: 5.7 h of training (2.7e13 operations per step,
50,000 steps), on an H200 1.2 h. Weights and second moments are 9 GB, and about 4 GB
more are needed beside. The language model has 5 GB in bfloat16. The store is of
2**25 rows, 155 GB a site (137 GB at attention), of which the 205 M activations of
training are 6.1 passes.

Gives: no L0 measured yet.
"""

import ml_collections

from experiments import quickstart
from experiments.paper import public_grid, recipe
from experiments.paper.choose import choose

SITES = ('resid_post.12', 'mlp_out.12', 'attn_pre_linear.12')


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The config.

  Args:
    arg: which of the SAEs; see `paper/choose.py`.
  """
  c = public_grid.one_gpu(quickstart.get_config(), 'gemma')
  c.lm.path = 'google/gemma-2-2b'
  c.lm.dtype = 'bfloat16'
  recipe.hub_text(
    c, 'HuggingFaceFW/fineweb', context_length=1024, subset='sample-10BT'
  )
  # What an SAE's features and the hidden states of eight contexts take is 1 GB.
  c.eval.batch_size = 8
  members = public_grid.members(SITES, 16_384, 'gemma')
  return choose(c, arg, members, default='resid_post.12')
