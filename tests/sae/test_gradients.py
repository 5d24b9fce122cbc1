"""Losses and gradients against float64 NumPy written from the equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsae_jax.sae.gated import GatedSAE
from gsae_jax.sae.layers import product
from gsae_jax.training.loss import error_scale, losses
from tests.support import reference
from tests.support.dictionaries import (
  B,
  F,
  activations,
  initial,
  module_of,
  trained,
  with_gaps,
)

TERMS = 'reconstruction', 'sparsity', 'auxiliary'


@functools.cache
def compiled(module):
  """The loss, its terms and the gradients of free parameters."""

  def loss(free, frozen, x):
    loss_B, terms = losses(module, frozen | free, x, 0.1, 0.7)
    return jnp.mean(loss_B), {k: jnp.mean(terms[k]) for k in TERMS}

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize('state', ['initial', 'trained'])
@pytest.mark.parametrize('variant', reference.VARIANTS)
def test_losses_and_gradients_of_every_parameter(variant, state, rng, x64):
  make = {'initial': initial, 'trained': lambda v: trained(v, rng)}[state]
  module, p64 = make(variant)
  params = {k: jnp.asarray(v) for k, v in p64.items()}
  x = activations(rng).astype(np.float64)
  architecture, options = reference.VARIANTS[variant]
  want_loss, want_terms, want = reference.LOSSES[architecture](
    p64, x, 0.1, error_scale=0.7, **options
  )
  frozen = {k: v for k, v in params.items() if k in module.frozen}
  free = {k: v for k, v in params.items() if k not in frozen}
  (value, terms), got = compiled(module)(free, frozen, x)
  np.testing.assert_allclose(value, want_loss, rtol=1e-12)
  assert want_terms.keys() == set(TERMS)
  for name in want_terms:
    np.testing.assert_allclose(terms[name], want_terms[name], rtol=1e-12)
  assert set(got) == set(want)
  for name in want:
    error = np.linalg.norm(got[name] - want[name])
    assert error <= 1e-11 * np.linalg.norm(want[name]), name


def test_the_variants_differ_in_what_they_say_they_do(rng):
  # Each one's gradient is not that of the paper's loss at the same point.
  _, p = trained('gated', rng)
  p['W_dec'] = p['W_dec'] * rng.uniform(0.5, 2, (F, 1))
  x = activations(rng).astype(np.float64)
  _, _, plain = reference.gated_loss_and_gradients(p, x, 0.1)
  for variant, parameter in (
    ('unfrozen', 'W_dec'), ('centre', 'b_dec'), ('norms_frozen', 'W_gate'),
    ('norms_free', 'W_dec'), ('no_r_mag', 'W_gate'),
  ):  # fmt: skip
    _, options = reference.VARIANTS[variant]
    _, _, g = reference.gated_loss_and_gradients(p, x, 0.1, **options)
    gap = np.linalg.norm(g[parameter] - plain[parameter])
    assert gap > 1e-3 * np.linalg.norm(plain[parameter]), variant


def test_the_trained_state_is_not_the_initial_one(rng):
  _, p = trained('gated', rng)
  assert np.abs(p['r_mag']).max() > 0.01
  assert np.abs(p['b_gate'] - p['b_mag']).max() > 0.01
  np.testing.assert_allclose(np.linalg.norm(p['W_dec'], axis=1), 1, rtol=1e-12)
  _, p = trained('norms_free', rng)
  assert np.ptp(np.linalg.norm(p['W_dec'], axis=1)) > 0.05


def test_rescale_and_shift_starts_equal_to_its_baseline(rng):
  module, p = initial('rescale_shift')
  x = activations(rng)
  params = {k: jnp.asarray(v, jnp.float32) for k, v in p.items()}
  baseline = {k: params[k] for k in module.frozen}
  got = module.apply({'params': params}, x)
  want = module_of('relu').apply({'params': baseline}, x)
  assert (np.asarray(want['f']) > 0).sum() > 100
  np.testing.assert_array_equal(got['f'], want['f'])
  np.testing.assert_array_equal(got['x_hat'], want['x_hat'])


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
  one = lambda p: jnp.mean(module.apply({'params': p}, x, method='terms')[term])
  gradients = jax.jit(jax.grad(one))(params)
  touched = {k for k, g in gradients.items() if np.abs(g).max() > 0}
  assert touched == TRAINED_BY[term]


def test_sparsity_and_auxiliary_move_b_dec_through_the_encoder_only(rng):
  # The decoder side would add 2 e / B to the auxiliary term's gradient.
  module, p = trained('gated', rng)
  x = with_gaps(activations(rng, rows=2 * B), B, p).astype(np.float64)
  params = {k: jnp.asarray(v, jnp.float32) for k, v in p.items()}
  one = lambda q: jnp.mean(
    module.apply({'params': q}, x, method='terms')['auxiliary']
  )
  got = jax.jit(jax.grad(one))(params)['b_dec']
  pi = (x - p['b_dec']) @ p['W_gate'] + p['b_gate']
  e = np.maximum(pi, 0) @ p['W_dec'] + p['b_dec'] - x
  want = -(((2 * e / B) @ p['W_dec'].T * (pi > 0)) @ p['W_gate'].T).sum(0)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_loss_scales_are_the_units_of_the_tables():
  # Paper D.1.1: errors over n; of some baselines, over the mean norm too.
  assert error_scale('sum', width=8, mean_norm=5.0) == 1
  assert error_scale('mean', width=8, mean_norm=5.0) == 1 / 8
  assert error_scale('mean_over_norm', width=8, mean_norm=5.0) == 1 / 40


@pytest.mark.parametrize('members', [0, 4])
@pytest.mark.parametrize('turned', [False, True])
def test_compiled_gradient_costs_seven_matrix_products(turned, members):
  module = GatedSAE(width=256, features=1024, turned=turned)
  params = module.init(jax.random.key(0), jnp.zeros((1, 256)))['params']
  total = lambda p, x: jnp.mean(losses(module, p, x, jnp.float32(0.1), 1.0)[0])
  gradient = jax.grad(total)
  if members:
    gradient = jax.vmap(gradient, in_axes=(0, None))
    params = {k: jnp.stack([v] * members) for k, v in params.items()}
  x = jnp.ones((256, 256))
  cost = jax.jit(gradient).lower(params, x).compile().cost_analysis()
  assert cost['flops'] / (2 * 256 * 256 * 1024 * max(members, 1)) <= 7.1


def test_bfloat16_products_round_their_factors_and_sum_in_float32(rng):
  a = rng.normal(size=(3, 5, 64)).astype(np.float32)
  b = rng.normal(size=(64, 32)).astype(np.float32)
  g = rng.normal(size=(3, 5, 32)).astype(np.float32)
  rounded = lambda v: np.asarray(v).astype(jnp.bfloat16).astype(np.float64)
  value, back = jax.vjp(lambda a, b: product(a, b, 'bfloat16'), a, b)
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(
    value, rounded(a) @ rounded(b), rtol=1e-5, atol=1e-5
  )
  da, db = back(jnp.asarray(g))
  assert da.dtype == db.dtype == jnp.float32
  np.testing.assert_allclose(
    da, rounded(g) @ rounded(b).T, rtol=1e-5, atol=1e-5
  )
  want = np.einsum('xyk,xyn->kn', rounded(a), rounded(g))
  np.testing.assert_allclose(db, want, rtol=1e-5, atol=1e-5)
  # And they are not the float32 ones.
  assert np.abs(value - a @ b).max() > 1e-3
