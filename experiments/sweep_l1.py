r"""Sixteen SAEs of one shape in one command: a sweep of the L1 coefficient.

Four coefficients by four seeds, on the embedded language model. On an
accelerator they are one program, and mesh.sae spreads them over devices:

  python -m gsae_jax.harvest  --config=experiments/sweep_l1.py --store=DIR
  python -m gsae_jax.train    --config=experiments/sweep_l1.py --store=DIR --workdir=DIR
  python -m gsae_jax.evaluate --config=experiments/sweep_l1.py --workdir=DIR
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
