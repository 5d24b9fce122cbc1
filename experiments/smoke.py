r"""The quickstart, shrunk until it only shows that everything runs.

Takes 20 s on 2 CPU cores for all four commands; L0 and loss recovered mean
nothing after 40 steps.

  python -m gsae_jax.harvest  --config=experiments/smoke.py --store=DIR
  python -m gsae_jax.train    --config=experiments/smoke.py --store=DIR --workdir=DIR
  python -m gsae_jax.evaluate --config=experiments/smoke.py --workdir=DIR
  python -m gsae_jax.report   --workdir=DIR
"""

import ml_collections

from experiments import quickstart


def get_config() -> ml_collections.ConfigDict:
  c = quickstart.get_config()
  c.text.context_length = 32
  c.sites = ('mlp_out.0', 'mlp_hidden.0')
  c.store.tokens = 4096
  c.store.shard_rows = 512
  c.store.chunk_rows = 16
  c.store.buffer_rows = 1024
  c.store.batch_contexts = 8
  c.train.steps = 40
  c.train.batch_size = 128
  c.train.warmup_steps = 4
  c.train.l1_warmup_steps = 4
  c.train.decay_steps = 8
  c.train.checkpoint_every = 20
  c.train.log_every = 5
  c.train.histogram_every = 20
  c.eval.tokens = 1000
  c.eval.batch_size = 8
  c.saes = tuple(
    {
      'name': f'{architecture}_{site}',
      'architecture': architecture,
      'site': site,
      'features': features,
      'l1': 0.1,
    }
    for site in c.sites
    for architecture, features in (('gated', 64), ('relu', 96))
  )
  return c
