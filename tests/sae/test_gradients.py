"""Losses and gradients against float64 NumPy written from the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsae_jax.sae import ARCHITECTURES
from gsae_jax.sae.gated import GatedSAE
from gsae_jax.training.step import total_loss
from tests.sae import reference

D, F, B = 24, 96, 64
REFERENCES = {
  'gated': reference.gated_loss_and_gradients,
  'relu': reference.relu_loss_and_gradients,
}


def activations(rng, rows=B):
  """Sparse combinations of directions, with a mean."""
  codes = rng.exponential(size=(rows, 40)) * (rng.random((rows, 40)) < 0.1)
  return (codes @ rng.normal(size=(40, D)) / 5 + 0.3).astype(np.float32)


def initial(architecture):
  module = ARCHITECTURES[architecture](width=D, features=F)
  params = module.init(jax.random.key(1), jnp.zeros((1, D)))['params']
  return module, {k: np.asarray(v, np.float64) for k, v in params.items()}


def trained(architecture, rng, steps=150):
  """Parameters after real training steps, in float64 by the reference."""
  module, p = initial(architecture)
  v = {k: np.zeros_like(w) for k, w in p.items()}
  for t in range(1, steps + 1):
    x = activations(rng).astype(np.float64)
    _, _, g = REFERENCES[architecture](p, x, 0.1)
    p, v = reference.adam_step(p, g, v, t, 3e-3)
  return module, p


@pytest.mark.parametrize('state', ['initial', 'trained'])
@pytest.mark.parametrize('architecture', ['gated', 'relu'])
def test_losses_and_gradients_of_every_parameter(architecture, state, rng):
  make = {'initial': initial, 'trained': lambda a: trained(a, rng)}[state]
  module, p64 = make(architecture)
  params = {k: jnp.asarray(v, jnp.float32) for k, v in p64.items()}
  p64 = {k: np.asarray(v, np.float64) for k, v in params.items()}
  x = activations(rng)
  want_loss, want_terms, want = REFERENCES[architecture](
    p64, x.astype(np.float64), 0.1
  )
  loss = lambda p: total_loss(module, p, x, jnp.float32(0.1), 'sum')
  (value, terms), got = jax.value_and_grad(loss, has_aux=True)(params)
  np.testing.assert_allclose(value, want_loss, rtol=1e-6)
  for name in want_terms:
    np.testing.assert_allclose(terms[name], want_terms[name], rtol=1e-6)
  assert set(got) == set(want)
  for name in want:
    error = np.linalg.norm(got[name] - want[name])
    assert error <= 1e-5 * np.linalg.norm(want[name]), name


def test_the_trained_state_is_not_the_initial_one(rng):
  _, p = trained('gated', rng)
  assert np.abs(p['r_mag']).max() > 0.01
  assert np.abs(p['b_gate'] - p['b_mag']).max() > 0.01
  np.testing.assert_allclose(np.linalg.norm(p['W_dec'], axis=1), 1, rtol=1e-12)


# Paper, Appendix G: which term trains which parameter (gradient is not zero).
TRAINED_BY = {
  'reconstruction': {'W_gate', 'r_mag', 'b_mag', 'W_dec', 'b_dec'},
  'sparsity': {'W_gate', 'b_gate', 'b_dec'},
  'auxiliary': {'W_gate', 'b_gate', 'b_dec'},
}


@pytest.mark.parametrize('term', TRAINED_BY)
def test_each_term_trains_the_parameters_that_the_paper_says(term, rng):
  module, p64 = trained('gated', rng)
  params = {k: jnp.asarray(v, jnp.float32) for k, v in p64.items()}
  x = activations(rng)
  one = lambda p: module.apply({'params': p}, x, method='losses')[term]
  gradients = jax.grad(one)(params)
  touched = {k for k, g in gradients.items() if np.abs(g).max() > 0}
  assert touched == TRAINED_BY[term]


def test_sparsity_and_auxiliary_move_b_dec_through_the_encoder_only(rng):
  # The decoder side would add 2 e / B to the auxiliary term's gradient.
  module, p = trained('gated', rng)
  x = activations(rng).astype(np.float64)
  params = {k: jnp.asarray(v, jnp.float32) for k, v in p.items()}
  one = lambda q: module.apply({'params': q}, x, method='losses')['auxiliary']
  got = jax.grad(one)(params)['b_dec']
  pi = (x - p['b_dec']) @ p['W_gate'] + p['b_gate']
  e = np.maximum(pi, 0) @ p['W_dec'] + p['b_dec'] - x
  want = -(((2 * e / B) @ p['W_dec'].T * (pi > 0)) @ p['W_gate'].T).sum(0)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_mean_loss_scale_divides_both_squared_errors_by_the_width(rng):
  module, p = initial('gated')
  params = {k: jnp.asarray(v, jnp.float32) for k, v in p.items()}
  x = activations(rng)
  value, terms = total_loss(module, params, x, jnp.float32(0.2), 'mean')
  error = terms['reconstruction'] + terms['auxiliary']
  want = error / D + 0.2 * terms['sparsity']
  np.testing.assert_allclose(value, want, rtol=1e-6)


def test_compiled_gradient_costs_seven_matrix_products():
  module = GatedSAE(width=128, features=1024)
  params = module.init(jax.random.key(0), jnp.zeros((1, 128)))['params']
  loss = lambda p, x: total_loss(module, p, x, jnp.float32(0.1), 'sum')[0]
  x = jnp.ones((256, 128))
  cost = jax.jit(jax.grad(loss)).lower(params, x).compile().cost_analysis()
  assert cost['flops'] / (2 * 256 * 128 * 1024) < 7.2
