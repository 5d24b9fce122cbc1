r"""GELU-1L, MLP neurons: the paper's comparison with Bricken et al. 2023.

mlp_hidden.0 (D = 2048), Gated of 131,072 features against baselines of 196,608,
contexts of 128, five coefficients each: 10 SAEs.

  C=experiments/gelu_1l.py        # or $C:gated, $C:relu, $C:gated,0:2
  python -m gsae_jax.harvest  --config=$C --store=DIR
  python -m gsae_jax.train    --config=$C --store=DIR --workdir=DIR
  python -m gsae_jax.evaluate --config=$C --workdir=DIR
  python -m gsae_jax.report   --workdir=DIR

`lm.path` is the folder that docs/models.md says how to make from the checkpoint
NeelNanda/GELU_1L512W_C4_Code, a torch file. The text is C4, four fifths of what
the model was trained on; the rest was code.

Takes: not measured. Estimate: 1.6e14 operations per step for all ten, so 42 h on
an H200 at 40 % of its bfloat16 peak, or 21 h on a TPU v5e-8
(--config.mesh.model=8). 54 GB of weights and second moments, about 25 GB beside.
The store is of 2**27 rows, 0.55 TB, of which the 1.23e9 activations of training
are 9.2 passes; the paper says nothing of passes. All of it without repetition is
--config.store.tokens=1228800000, 5.0 TB. The model is so small that
--config.loader.source=stream --config.loader.shuffle_rows=1048576, in one process
and without a store, should cost little.

Gives: no L0 measured. The paper has this model in figures only (5, 6, 8, 9),
without numbers: Gated ahead at every L0, with gamma near 1.

The paper does not publish this model's coefficients. The grid is centred on the
one in use elsewhere: the code of Nanda's public dictionaries for this site
(neelnanda-io/1L-Sparse-Autoencoder) has 3e-4 times a sum over batches of 4096, so
1.2 per token against squared errors that are sums, and 6e-4 over the width, the
units here. It reaches 4x to either side, by factors of 2. Both arms have the same
units on this model, so they have the same grid.
"""

import ml_collections

from experiments import quickstart
from experiments.paper import recipe
from experiments.paper.choose import choose

SITE = 'mlp_hidden.0'
L1 = (1.5e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3)


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The config.

  Args:
    arg: which of the SAEs; see `paper/choose.py`.
  """
  c = recipe.paper(quickstart.get_config(), 'gelu')
  recipe.accelerator(c)
  c.lm.path = 'gelu-1l'
  recipe.hub_text(c, 'allenai/c4', context_length=128, subset='en')
  c.store.tokens = 2**27
  members = tuple(
    recipe.member(
      architecture,
      'gelu',
      name=f'{architecture}_{l1:g}',
      site=SITE,
      features=features,
      l1=l1,
    )
    for architecture, features in (('gated', 131_072), ('relu', 196_608))
    for l1 in L1
  )
  return choose(c, arg, members, default=SITE)
