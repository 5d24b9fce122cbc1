r"""The paper's study on a real Llama, stories260K: MLP output and residual stream.

The model and its text are given as for experiments/stories260k.py:

  F="--config.lm.path=FOLDER --config.text.path=FILE"
  python -m experiments.paper.all --config=experiments/paper/stories260k.py $F --workdir=DIR

Takes about an hour and a half on a core of two (AMD EPYC, Python 3.11, JAX 0.10.2)
that did other work beside. Gives, after 3.07 M activations per SAE, L0 of Gated at
equal loss recovered 0.704 [0.642, 0.725] of the baseline's at mlp_out.2, still
rising, and 0.850 [0.821, 0.875] at resid_post.2; all in RESULTS.md.
"""

import ml_collections

from experiments import stories260k


def get_config() -> ml_collections.ConfigDict:
  c = stories260k.get_config()
  c.sites = ('mlp_out.2', 'resid_post.2')
  c.train.checkpoint_every = c.train.get_ref('steps') // 8
  c.eval.tokens = 65_536
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
    # Tuned for each arm and site, see experiments/README.md.
    for site, baseline_rate in (('mlp_out.2', 1.2e-2), ('resid_post.2', 6e-3))
    for architecture, features, rate, ends in (
      ('gated', 256, 3e-3, (0.05, 0.5)),
      ('relu', 384, baseline_rate, (0.02, 0.25)),
    )
    for l1 in ends
  )
  return c
