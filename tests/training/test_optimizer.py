"""Adam's scalars against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from gsae_jax.training.optimizer import DECAY, REBASE, scales


@pytest.mark.parametrize(
  'count', [1, 2, 3, 10, 100, 999, 1023, 1024, 1025, 2048, 50_001]
)
def test_scales_are_those_of_float64(count):
  got = scales(jnp.int32(count))
  power = DECAY ** (count % REBASE)
  # A few roundings of float32; float32(0.999)**count would be 1e-5 off.
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
  close(got.gain, (1 - DECAY) / power)
  close(got.correct, power / (1 - DECAY**count))
  close(got.keep, 1 if count % REBASE else DECAY**REBASE)
