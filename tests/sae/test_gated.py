"""The Gated encoder: its values, its edges."""

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax.sae.gated import GatedSAE


def random_params(rng, D=32, F=128):
  W_dec = rng.normal(size=(F, D))
  return {
    'W_dec': W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True),
    'W_gate': rng.normal(size=(D, F)) / 3,
    'b_gate': rng.normal(size=F),
    'r_mag': rng.normal(size=F) / 2,
    'b_mag': rng.normal(size=F),
    'b_dec': rng.normal(size=D),
  }


def test_values_of_a_published_example():
  # SAELens's own fixture for its gated SAE.
  params = {
    'W_gate': jnp.ones((2, 3)),
    'b_gate': jnp.array([-2.0, 0.0, 1.0]),
    'r_mag': jnp.array([1.0, 2.0, 3.0]),
    'b_mag': jnp.ones(3),
    'W_dec': jnp.ones((3, 2)),
    'b_dec': jnp.zeros(2),
  }
  out = GatedSAE(2, 3).apply({'params': params}, jnp.array([[0.3, 0.3]]))
  np.testing.assert_allclose(out['f'][0], [0, 5.4334, 13.0513], atol=1e-4)
  np.testing.assert_allclose(out['x_hat'][0], [18.4848, 18.4848], atol=2e-4)


def test_the_gate_is_closed_at_exactly_zero():
  params = {
    'W_gate': jnp.eye(2),
    'b_gate': jnp.zeros(2),
    'r_mag': jnp.zeros(2),
    'b_mag': jnp.ones(2),
    'W_dec': jnp.eye(2),
    'b_dec': jnp.zeros(2),
  }
  x = jnp.array([[0.0, 1e-6]])
  f = GatedSAE(2, 2).apply({'params': params}, x, method='encode')
  np.testing.assert_allclose(f, [[0.0, 1.0]], atol=1e-5)


def test_initial_parameters():
  module = GatedSAE(16, 64, encoder_scale=0.2)
  p = module.init(jax.random.key(0), jnp.zeros((1, 16)))['params']
  np.testing.assert_allclose(np.linalg.norm(p['W_dec'], axis=1), 1, rtol=1e-6)
  np.testing.assert_allclose(p['W_gate'], 0.2 * p['W_dec'].T, rtol=1e-6)
  for name in ('b_gate', 'r_mag', 'b_mag', 'b_dec'):
    assert not np.any(p[name])


def test_gradients_flow_to_the_activations(rng, x64):
  # Attribution and steering need them; training asks for none.
  p = random_params(rng)
  x = rng.normal(size=(2, 3, 32))
  weight = rng.normal(size=(2, 3, 128))
  params = {k: jnp.asarray(v) for k, v in p.items()}
  total = lambda x: jnp.sum(
    weight * GatedSAE(32, 128).apply({'params': params}, x, method='encode')
  )
  z = (x - p['b_dec']) @ p['W_gate']
  open_ = (z + p['b_gate'] > 0) & (np.exp(p['r_mag']) * z + p['b_mag'] > 0)
  want = (weight * open_ * np.exp(p['r_mag'])) @ p['W_gate'].T
  np.testing.assert_allclose(jax.grad(total)(jnp.asarray(x)), want, rtol=1e-10)


def test_parameter_gradients_are_the_same_for_contexts_of_rows(rng, x64):
  p = {k: jnp.asarray(v) for k, v in random_params(rng).items()}
  x = rng.normal(size=(2, 6, 32))
  total = lambda p, x: jnp.sum(GatedSAE(32, 128).apply({'params': p}, x)['f'])
  gradient = jax.jit(jax.grad(total))
  flat = gradient(p, x.reshape(12, 32))
  for name, g in gradient(p, x).items():
    np.testing.assert_allclose(g, flat[name], rtol=1e-9, atol=1e-11)
