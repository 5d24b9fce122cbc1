r"""Pythia-2.8B: the paper's sites, layers, widths and coefficients.

Residual stream, MLP output (both D = 2560) and attention before its output
projection (32 heads of 80, D = 2560 too) at layers 4, 12, 16, 20 and 28 of 32,
contexts of 2048: the 108 rows of Tables 5 to 8. The default is resid_post.16, of
the layer with most rows: 12 SAEs, Gated of 32,768 and 131,072 features against
baselines of 49,152 and 196,608.

  C=experiments/pythia_2p8b.py    # or $C:mlp_out.12 and so on, see paper/choose.py
  python -m gsae_jax.harvest  --config=$C --store=DIR
  python -m gsae_jax.train    --config=$C --store=DIR --workdir=DIR
  python -m gsae_jax.evaluate --config=$C --workdir=DIR
  python -m gsae_jax.report   --workdir=DIR

Meant for a TPU v5e-8 or larger, with features over 4 chips; on one GPU of 80 GB,
--config.mesh.model=1 and fewer SAEs at a time ($C:gated, then $C:relu). The text
is the Pile without its books, which is what of it is still public.

Takes: not measured. Estimate for the default: 1.5e14 operations per step, so 26 h
on a v5e-8 at 40 % of its bfloat16 peak, and 50 GB of weights and second moments.
An SAE has 8 bytes per parameter of those (1.3 GB and 5.4 GB for Gated, 2.0 GB and
8.1 GB for baselines), and the one whose turn it is 6 more.
The store is of 2**27 rows, 0.69 TB for every site ($C:all: fifteen, 10 TB), of
which the 1.64e9 activations of training are 12.2 passes; the paper says nothing of
passes. Without repetition it is --config.store.tokens=1638400000, 8.4 TB a site,
or, in one process and without a store, --config.loader.source=stream with
--config.loader.shuffle_rows=1048576. Harvest holds two buffers of 5.4 GB for every
site in host memory: with many sites, lower store.buffer_rows.

Gives: no L0 measured here. The paper's, for the default:

                            L0              loss recovered      gamma
  Gated, 32,768 features    12.5 to 71.5    0.943 to 0.983      0.998 to 1.000
  Gated, 131,072            18.9 to 95.6    0.966 to 0.986      0.991 to 0.996
  baseline, 49,152          42.7 to 94.8    0.956 to 0.965      0.940 to 0.975
  baseline, 196,608         10.9 to 49.1    0.841 to 0.902      0.929 to 0.946

and L0 of Gated at equal loss recovered, over both widths and as the report computes
it, 0.33 of the baseline's.
"""

import ml_collections

from experiments import quickstart
from experiments.paper import recipe, tables
from experiments.paper.choose import choose


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The config.

  Args:
    arg: which of the SAEs; see `paper/choose.py`.
  """
  c = recipe.paper(quickstart.get_config(), 'pythia')
  recipe.accelerator(c)
  c.lm.path = 'EleutherAI/pythia-2.8b'
  c.lm.dtype = 'bfloat16'
  recipe.hub_text(c, 'monology/pile-uncopyrighted', context_length=2048)
  c.store.tokens = 2**27
  c.loader.unit = 'shard'
  c.mesh.model = 4
  c.eval.batch_size = 8
  members = tables.members('Pythia-2.8B', 'pythia')
  return choose(c, arg, members, default='resid_post.16')
