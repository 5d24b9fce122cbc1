"""The smoke test with one SAE, which compiles quickly, for long enough to be stopped."""

import ml_collections

from experiments import smoke


def get_config() -> ml_collections.ConfigDict:
  c = smoke.get_config()
  c.saes = c.saes[:1]
  c.train.steps = 400
  c.train.checkpoint_every = 300
  c.train.writers = ()
  return c
