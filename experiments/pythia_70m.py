r"""Pythia-70M, layer 3 of 6: Gated against baseline SAEs on one small GPU.

resid_post.3, mlp_out.3 or attn_pre_linear.3 (D = 512 each), Gated of 16,384
features against baselines of 24,576, six coefficients each: 12 SAEs a site. Model,
layer, width and contexts of 128 are those of SAEBench's public Gated sweep
(sae_bench_pythia70m_sweep_gated_ctx128_0730); the recipe is the paper's.

  C=experiments/pythia_70m.py     # resid_post.3, or $C:mlp_out.3, $C:all
  python -m gsae_jax.harvest  --config=$C --store=DIR
  python -m gsae_jax.train    --config=$C --store=DIR --workdir=DIR
  python -m gsae_jax.evaluate --config=$C --workdir=DIR
  python -m gsae_jax.report   --workdir=DIR

Takes: not measured. Estimate for a site, on a GPU of 24 GB with 165 TFLOP/s of
bfloat16 of which 40 % are reached: 76 min of training (6e12 operations per step,
50,000 steps), and minutes for the rest; stacked, the members want about 15 GB. The
store is of 2**25 rows, 34 GB a site, of which the 205 M activations of training are
6.1 passes.

Gives: no L0 measured yet.
"""

import ml_collections

from experiments import quickstart
from experiments.paper import public_grid, recipe
from experiments.paper.choose import choose

SITES = ('resid_post.3', 'mlp_out.3', 'attn_pre_linear.3')


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The config.

  Args:
    arg: which of the SAEs; see `paper/choose.py`.
  """
  c = public_grid.one_gpu(quickstart.get_config(), 'pythia')
  c.lm.path = 'EleutherAI/pythia-70m-deduped'
  recipe.hub_text(c, 'monology/pile-uncopyrighted', context_length=128)
  members = public_grid.members(SITES, 16_384, 'pythia')
  return choose(c, arg, members, default='resid_post.3')
