r"""The paper's study on the embedded language model: two sites of its one layer.

  python -m experiments.paper.all --config=experiments/paper/embedded.py --workdir=DIR

Takes about an hour and a half on a core of two (AMD EPYC, Python 3.11, JAX 0.10.2)
that did other work beside, without Appendix A. Gives, after 3.07 M activations per
SAE, L0 of Gated at equal loss recovered 0.477 [0.453, 0.511] of the baseline's at
mlp_out.0 and 0.429 [0.393, 0.465] at attn_pre_linear.0; all in RESULTS.md.
"""

import ml_collections

from experiments import quickstart


def get_config() -> ml_collections.ConfigDict:
  c = quickstart.get_config()
  c.sites = ('mlp_out.0', 'attn_pre_linear.0')
  c.train.checkpoint_every = c.train.get_ref('steps') // 8
  # The standard library's documents are long: all of the held-out part.
  c.eval.tokens = 65_536
  c.eval.stride = 3
  c.eval.batch_size = 64
  # The ends of each arm's range; experiments/paper/arms.py lays more between.
  c.saes = tuple(
    {
      'name': f'{architecture}_{site}_{l1:g}',
      'architecture': architecture,
      'site': site,
      'features': features,
      'l1': l1,
      'learning_rate': rate,
    }
    for site in c.sites
    for architecture, features, rate, ends in (
      ('gated', 256, 3e-3, (0.06, 0.5)),
      ('relu', 384, 6e-3, (0.03, 0.3)),
    )
    for l1 in ends
  )
  return c
