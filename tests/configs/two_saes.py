"""The smoke test with two of its SAEs, of which half as much is compiled."""

import ml_collections

from experiments import smoke


def get_config() -> ml_collections.ConfigDict:
  c = smoke.get_config()
  c.saes = (c.saes[0], c.saes[-1])
  return c
