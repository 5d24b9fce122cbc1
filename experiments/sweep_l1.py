r"""Sixteen SAEs of one shape in one command: a sweep of the L1 coefficient.

Four coefficients by four seeds, on the embedded language model. On an
accelerator they are one program, and mesh.sae spreads them over devices:

  python -m gsae_jax.harvest  --config=experiments/sweep_l1.py --store=DIR
  python -m gsae_jax.train    --config=experiments/sweep_l1.py --store=DIR --workdir=DIR
  python -m gsae_jax.evaluate --config=experiments/sweep_l1.py --workdir=DIR

Takes 5 min on 2 CPU cores (AMD EPYC, Python 3.11, JAX 0.10.2) that did other work
beside. Gives, after 1.02 M activations per SAE, over the four seeds:

  l1     L0               loss recovered     gamma
  0.05   135.3 to 136.8   0.9884 to 0.9933   0.998
  0.1     77.5 to  78.4   0.9655 to 0.9707   0.997 to 0.998
  0.2     26.2 to  26.6   0.9042 to 0.9100   0.998 to 0.999
  0.4      6.1 to   6.2   0.7976 to 0.8038   0.999 to 1.000
"""

import ml_collections

from experiments import quickstart


def get_config() -> ml_collections.ConfigDict:
  c = quickstart.get_config()
  c.train.steps = 2_000
  c.train.checkpoint_every = c.train.get_ref('steps') // 4
  c.saes = tuple(
    {
      'name': f'l1_{l1:g}_seed_{seed}',
      'architecture': 'gated',
      'site': 'mlp_out.0',
      'features': 512,
      'l1': l1,
      'seed': seed,
    }
    for l1 in (0.05, 0.1, 0.2, 0.4)
    for seed in range(4)
  )
  return c
