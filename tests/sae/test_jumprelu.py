"""The JumpReLU form of every architecture that has one (Appendix E)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gsae_jax import sae
from gsae_jax.errors import UserError
from gsae_jax.sae import make_module
from gsae_jax.sae.jumprelu import JumpReluSAE, parameters

D, F = 32, 128

FORMS = {
  'tied': ('gated', {'encoder': 'tied'}),
  'no_r_mag': ('gated', {'encoder': 'no_r_mag'}),
  'relu': ('relu', {}),
  'rescale_shift': ('rescale_shift', {}),
}


def make(rng, form, dtype=np.float64):
  """A module, and parameters of which none is where it would start."""
  architecture, options = FORMS[form]
  about = {'architecture': architecture, 'width': D, 'features': F}
  module = make_module(sae.VARIANTS | about | options)
  shapes = module.init(jax.random.key(0), jnp.zeros((1, D)))['params']
  scale = {'W_gate': 0.3, 'W_enc': 0.3, 'r_mag': 0.5}
  draw = lambda name, v: rng.normal(size=v.shape) * scale.get(name, 1.0)
  return module, {k: draw(k, v).astype(dtype) for k, v in shapes.items()}


def both(form, module, params, x):
  """Its features, and what its JumpReLU form is and gives."""
  jumped = parameters(FORMS[form][0], params)
  f = module.apply({'params': params}, x)['f']
  return np.asarray(f), jumped, JumpReluSAE(D, F).apply({'params': jumped}, x)


def gate_inputs(params, x):
  """What the gates compare with 0, in float64."""
  p = {k: v.astype(np.float64) for k, v in params.items()}
  W = p['W_gate'] if 'W_gate' in p else p['W_enc']
  b = p['b_gate'] if 'b_gate' in p else p['b_enc']
  return (x - p['b_dec']) @ W + b


@pytest.mark.parametrize('form', FORMS)
def test_it_computes_the_same(form, rng, x64):
  module, params = make(rng, form)
  x = rng.normal(size=(512, D))
  f, jumped, out = both(form, module, params, x)
  assert 0.1 < (f > 0).mean() < 0.9
  np.testing.assert_array_equal(out['f'] > 0, f > 0)
  np.testing.assert_allclose(out['f'], f, rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(
    out['x_hat'], f @ params['W_dec'] + params['b_dec'], rtol=1e-11, atol=1e-11
  )
  if form == 'relu':
    assert not jumped['threshold'].any()
  else:  # Below 0 the ReLU is the gate, above it the threshold is.
    assert jumped['threshold'].min() < -0.5 < 0.5 < jumped['threshold'].max()
    p = (x - params['b_dec']) @ jumped['W_enc'] + jumped['b_enc']
    assert ((p > 0) & (p < jumped['threshold'])).sum() > 100
    assert ((p < 0) & (p > jumped['threshold'])).sum() > 100


@pytest.mark.parametrize('form', FORMS)
def test_gates_differ_by_rounding_only(form, rng):
  module, params = make(rng, form, np.float32)
  x = rng.normal(size=(4096, D)).astype(np.float32)
  f, jumped, out = both(form, module, params, x)
  assert {v.dtype for v in jumped.values()} == {np.dtype(np.float32)}
  apart = np.abs(gate_inputs(params, x)) > 1e-5
  assert apart.mean() > 0.9999
  np.testing.assert_array_equal((out['f'] > 0)[apart], (f > 0)[apart])
  np.testing.assert_allclose(out['f'][apart], f[apart], rtol=1e-5, atol=1e-5)


def test_the_gate_is_closed_at_the_threshold():
  params = {
    'W_enc': jnp.eye(2),
    'b_enc': jnp.zeros(2),
    'threshold': jnp.array([0.5, -0.5]),
    'W_dec': 2 * jnp.eye(2),
    'b_dec': jnp.ones(2),
  }
  x = jnp.array([[1.5, 0.75], [1.75, 1.25]])
  out = JumpReluSAE(2, 2).apply({'params': params}, x)
  np.testing.assert_array_equal(out['f'], [[0, 0], [0.75, 0.25]])
  np.testing.assert_array_equal(out['x_hat'], [[1, 1], [2.5, 1.5]])


def test_it_is_its_own_form(rng):
  _, params = make(rng, 'tied')
  jumped = parameters('gated', params)
  again = parameters('jumprelu', jumped)
  assert again.keys() == jumped.keys()
  assert all(again[k] is v for k, v in jumped.items())


def test_an_untied_encoder_has_none(rng):
  _, params = make(rng, 'tied')
  params['W_mag'] = params['W_gate']
  with pytest.raises(UserError, match='of two products.*train .tied. or'):
    parameters('gated', params)


@pytest.mark.parametrize('architecture', sae.ARCHITECTURES)
def test_features_of_every_parameter_can_be_divided(architecture):
  about = {'architecture': architecture, 'width': 3, 'features': 5}
  module = make_module(sae.VARIANTS | about)
  params = module.init(jax.random.key(0), jnp.zeros((1, 3)))['params']
  for name, v in params.items():
    want = P(*('model' if n == 5 else None for n in v.shape))
    assert sae.SPECS.get(name, P(None)) == want, name
