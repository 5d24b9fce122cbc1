r"""Gemma-7B (base): the paper's sites, layers, widths and coefficients.

Residual stream, MLP output (both D = 3072) and attention before its output
projection (16 heads of 256, D = 4096) at layers 6, 13, 20 and 27 of 28, contexts
of 1024, Gated of 131,072 features against baselines of 196,608: the 175 rows of
Tables 1 to 4, of which 165 differ. The default is resid_post.20, of the layer with
most rows: 8 Gated SAEs and 11 baselines.

  C=experiments/gemma_7b.py       # or $C:mlp_out.13 and so on, see paper/choose.py
  python -m gsae_jax.harvest  --config=$C       --store=DIR
  python -m gsae_jax.train    --config=$C:gated --store=DIR --workdir=DIR
  python -m gsae_jax.evaluate --config=$C:gated --workdir=DIR
  python -m gsae_jax.report   --workdir=DIR

and the same in other workdirs for $C:relu,0:6 and $C:relu,6:11. Training is meant
for a TPU v5e-8 or larger, with features over 8 chips; all 19 at once want sixteen
(--config.mesh.model=16). The model, 17 GB in bfloat16, is divided over the same
chips: 1.8 GiB of each in harvest, 3.2 GiB in evaluation (docs/models.md). The text
is FineWeb's sample; the paper's was some web text unlike Gemma's own.

Takes: not measured. Estimate: 2.3e13 operations per step for a Gated SAE and
2.5e13 for a baseline, so 3.1 h and 3.3 h each on a v5e-8 at 40 % of its bfloat16
peak, 60 h for the default. Weights and second moments are 8 bytes per parameter,
6.4 GB and 9.7 GB (158 GB for all 19; a third more at attention sites); the one
whose turn it is has 6 bytes more per parameter, and up to six arrays of [B, F].
The store is of 2**27 rows, 0.82 TB for a site (1.10 TB at attention; $C:all:
twelve sites, 11 TB), of which the 1.23e9 activations of training are 9.2 passes;
the paper says nothing of passes. Without repetition it is
--config.store.tokens=1228800000, 7.5 TB and 10.1 TB a site, or, in one process and
without a store, --config.loader.source=stream with
--config.loader.shuffle_rows=1048576. Harvest holds two buffers of 6.4 GB for every
site in host memory: with many sites, lower store.buffer_rows.

Gives: no L0 measured here. The paper's, for the default:

             L0              loss recovered      gamma
  Gated      8.2 to 212.1    0.962 to 0.997      0.997 to 1.040
  baseline   10.4 to 124.8   0.907 to 0.980      0.773 to 2.179

and L0 of Gated at equal loss recovered, as the report computes it, 0.40 of the
baseline's.

In four rows elsewhere the paper's L0 is negative: a counter that overflowed. Their
coefficients are here, and their dictionaries will be very dense.
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
  c = recipe.paper(quickstart.get_config(), 'gemma')
  recipe.accelerator(c)
  c.lm.path = 'google/gemma-7b'
  c.lm.dtype = 'bfloat16'
  recipe.hub_text(
    c, 'HuggingFaceFW/fineweb', context_length=1024, subset='sample-10BT'
  )
  c.store.tokens = 2**27
  c.loader.unit = 'shard'
  c.mesh.model = 8
  c.eval.batch_size = 8
  members = tables.members('Gemma-7B', 'gemma')
  return choose(c, arg, members, default='resid_post.20')
