"""Products by tiles, against the whole product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsae_jax.sae import tiles

F, D = 512, 24


def codes(rng, rows, open_):
  """`[rows, F]`, with so many features in use, the same on every row."""
  f_BF = np.zeros((rows, F), np.float32)
  f_BF[:, rng.permutation(F)[:open_]] = rng.exponential(size=(rows, open_))
  return f_BF


def test_capacities_reach_from_the_smallest_to_all():
  assert tiles.capacities(64, 512, halves=False) == (64, 128, 256, 512)
  assert tiles.capacities(16, 64, halves=True) == (16, 24, 32, 64)
  assert tiles.capacities(64, 255, halves=False) == (64, 128, 255)
  assert tiles.capacities(16, 16, halves=True) == (16,)
  assert tiles.capacities(64, 48, halves=False) == (48,)


def test_compact_lists_what_is_true(rng):
  mask = rng.random(40) < 0.3
  want = np.flatnonzero(mask)
  got = tiles.compact(jnp.asarray(mask), 20)
  np.testing.assert_array_equal(got[: len(want)], want)
  assert not got[len(want) :].any()


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
@pytest.mark.parametrize('few', [0.0, 2.0])  # Never by tiles; always.
def test_decoding_equals_the_product(few, precision, rng, monkeypatch):
  monkeypatch.setattr(tiles, 'FEW', few)
  W_FD = jnp.asarray(rng.normal(size=(F, D)), jnp.float32)
  decode = jax.jit(lambda f: tiles.decode(f, W_FD, precision))
  rounded = lambda v: np.float64(
    np.asarray(v, jnp.bfloat16) if precision == 'bfloat16' else v
  )
  for open_ in (0, 1, 63, 64, 65, 128, 129, 256, 257, F):
    f_BF = codes(rng, 40, open_)
    want = rounded(f_BF) @ rounded(W_FD)
    np.testing.assert_allclose(decode(f_BF), want, rtol=2e-5, atol=2e-5)
  # Rows that fill no tile, and more axes.
  f_BF = codes(rng, 30, 50).reshape(2, 15, F)
  want = rounded(f_BF) @ rounded(W_FD)
  np.testing.assert_allclose(decode(f_BF), want, rtol=2e-5, atol=2e-5)


def test_what_is_in_use_decides(rng):
  # Codes that are no numbers where no tile looks at them tell who was asked.
  W_FD = jnp.asarray(rng.normal(size=(F, D)), jnp.float32)
  W_FD = W_FD.at[7].set(np.nan)
  f_BF = codes(rng, 16, F // 8)
  f_BF[:, 7] = 0
  assert np.isfinite(tiles.decode(f_BF, W_FD, 'float32')).all()
  many = codes(rng, 16, F // 4)
  many[:, 7] = 0
  assert np.isnan(tiles.decode(many, W_FD, 'float32')).all()
