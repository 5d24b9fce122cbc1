"""Pursuits against a dense float64 NumPy routine, and on planted codes."""

import functools

import jax
import numpy as np
import pytest

from gsae_jax.errors import UserError
from gsae_jax.evaluation import metrics, pursuit
from gsae_jax.evaluation.pursuit import METHODS, Pursuit
from gsae_jax.evaluation.splice import Evaluator
from tests.support.contexts import held_out_contexts, layout_of
from tests.support.forward import QUICK


def directions(rng, F, D, mean=0.0):
  W_FD = rng.normal(size=(F, D)) + mean
  return W_FD / np.linalg.norm(W_FD, axis=1, keepdims=True)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _solve(module, params, x_BD):
  return module.apply({'params': params}, x_BD)


@functools.partial(jax.jit, static_argnums=(0, 3), compiler_options=QUICK)
def _sweep(module, params, x_BD, ks):
  return module.apply({'params': params}, x_BD, ks, method='sweep')


def solve(method, W_FD, x_BD, k, b_dec_D=None):
  """`f` and `x_hat` as a user gets them."""
  module = Pursuit(W_FD.shape[1], len(W_FD), k, method)
  if b_dec_D is None:
    b_dec_D = np.zeros(module.width, W_FD.dtype)
  out = _solve(module, {'W_dec': W_FD, 'b_dec': b_dec_D}, x_BD)
  return np.asarray(out['f']), np.asarray(out['x_hat'])


def sweep(method, W_FD, x_BD, ks):
  module = Pursuit(W_FD.shape[1], len(W_FD), 1, method)
  params = {'W_dec': W_FD, 'b_dec': np.zeros(module.width, W_FD.dtype)}
  out = _sweep(module, params, x_BD, ks)
  return np.asarray(out['x_hat']), np.asarray(out['l0'])


def reference(method, D_FD, x_D, K):
  """Dense codes after each iteration, for rows of norm 1: `[K, F]`.

  The routine of the paper's appendix A; for 'matching', Mallat and Zhang's with
  positive amplitudes only.
  """
  alpha, found = np.zeros(len(D_FD)), []
  for _ in range(K):
    r = x_D - D_FD.T @ alpha
    c = D_FD @ r
    best = np.argmax(c)
    if method == 'matching':
      alpha[best] += max(c[best], 0)
    else:
      S = alpha != 0
      S[best] = True
      g = np.where(S, c, 0)
      v = D_FD.T @ g
      mu = (v @ r) / (v @ v) if v @ v else 0
      alpha = np.maximum(alpha + mu * g, 0)
    found.append(alpha.copy())
  return np.array(found)


def planted(rng, rows=128, D=256, F=512, atoms=4):
  """A dictionary of coherence 0.3, and rows of `atoms` amplitudes in [1, 2]."""
  W_FD = directions(rng, F, D)
  f_BF = np.zeros((rows, F))
  for f_F in f_BF:
    f_F[rng.choice(F, atoms, replace=False)] = rng.uniform(1, 2, atoms)
  return np.float32(W_FD), np.float32(f_BF), np.float32(f_BF @ W_FD)


def small(rng):
  """Dictionary and rows in float64, where rounding does not choose atoms.

  Tests that take these share their programs.
  """
  W, _, x = planted(rng, rows=40, D=32, F=96)
  W = np.float64(W)
  return W / np.linalg.norm(W, axis=1, keepdims=True), np.float64(x)


def relative_errors(x_hat_BD, x_BD):
  return np.linalg.norm(x_hat_BD - x_BD, axis=-1) / np.linalg.norm(x_BD, axis=1)


@pytest.mark.parametrize('method', METHODS)
def test_every_iteration_is_that_of_the_routine(method, rng, x64):
  # Crowded and to one side, so that atoms are dropped and chosen again.
  W_FD = directions(rng, 40, 12, mean=0.7)
  x_BD = rng.normal(size=(200, 12)) + 0.7
  ks = tuple(range(1, 25))
  want = np.array([reference(method, W_FD, x_D, 24) for x_D in x_BD])
  dropped = ((want[:, :-1] > 0) & (want[:, 1:] == 0)).sum()
  assert dropped > 50 or method == 'matching'
  x_hat, l0 = sweep(method, W_FD, x_BD, ks)
  np.testing.assert_array_equal(l0.T, (want > 0).sum(-1))
  np.testing.assert_allclose(
    x_hat.swapaxes(0, 1), want @ W_FD, rtol=1e-9, atol=1e-11
  )
  f, _ = solve(method, W_FD, x_BD, 7)
  np.testing.assert_allclose(f, want[:, 6], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('method', METHODS)
def test_planted_atoms_are_found(method, rng):
  W, planted_f, x = planted(rng)
  coherence = np.abs(W @ W.T - np.eye(len(W))).max()
  assert 0.2 < coherence < 0.35
  f, x_hat = solve(method, W, x, 4)
  np.testing.assert_array_equal(f > 0, planted_f > 0)
  assert relative_errors(x_hat, x).max() < 0.2
  if method == 'matching':  # Overshoots of correlated atoms are left.
    return
  f, x_hat = solve(method, W, x, 16)
  assert relative_errors(x_hat, x).max() < 2e-6
  np.testing.assert_allclose(f, planted_f, atol=5e-6)


@pytest.mark.integration
def test_gradient_pursuit_is_the_better_of_the_two(rng):
  W, _, x = planted(rng)
  errors = {
    m: relative_errors(sweep(m, W, x, (4, 8, 16))[0], x).mean(1)
    for m in METHODS
  }
  assert np.all(errors['gradient'] < [0.06, 1e-3, 1e-6])
  assert np.all(errors['matching'] > [0.06, 0.03, 0.02])


@pytest.mark.integration
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('data', ['planted', 'structureless'])
def test_no_more_than_k_atoms_and_none_negative(method, data, rng, x64):
  W, x = small(rng)
  if data == 'structureless':
    x = rng.normal(size=x.shape)
  ks = (1, 5, 35)
  x_hats, l0s = sweep(method, W, x, ks)
  for k, x_hat_k, l0 in zip(ks, x_hats, l0s, strict=True):
    f, x_hat = solve(method, W, x, k)
    count = (f != 0).sum(1)
    assert count.max() <= k and count.min() > 0 and f.min() == 0
    np.testing.assert_array_equal(l0, count)
    # The state after k iterations of more.
    np.testing.assert_allclose(x_hat_k, x_hat, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(x_hat, f @ W, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('method', METHODS)
def test_norms_of_rows_change_units_only(method, rng, x64):
  W, x = small(rng)
  scale_F = np.exp(rng.normal(size=96))
  f, x_hat = solve(method, W, x, 5)
  f_scaled, x_hat_scaled = solve(method, scale_F[:, None] * W, x, 5)
  np.testing.assert_allclose(f_scaled * scale_F, f, rtol=1e-9, atol=1e-11)
  np.testing.assert_allclose(x_hat_scaled, x_hat, rtol=1e-9, atol=1e-11)
  # One atom: the projection on it, c / ||d||^2 of the largest c / ||d||.
  f, _ = solve(method, scale_F[:, None] * W, x, 1)
  best = np.argmax(x @ W.T, axis=1)
  np.testing.assert_array_equal(f.argmax(1), best)
  np.testing.assert_allclose(
    f.max(1), (x @ W.T).max(1) / scale_F[best], rtol=1e-9
  )


@pytest.mark.parametrize('method', METHODS)
def test_nothing_left_to_explain(method):
  # Orthogonal atoms: the residual is 0 after two, exactly.
  W = np.eye(4, dtype=np.float32)
  x = np.array([[3, 0, 2, 0], [0, 0, 0, 0]], np.float32)
  f, x_hat = solve(method, W, x, 30)
  np.testing.assert_allclose(f, x, rtol=1e-6)
  np.testing.assert_allclose(x_hat, x, rtol=1e-6)
  # No atom has a positive correlation.
  f, x_hat = solve(method, W, -1 - x, 3)
  assert not f.any() and not x_hat.any()
  # Atoms of zeros are none.
  W[2] = 0
  f, _ = solve(method, W, x, 3)
  np.testing.assert_allclose(f, [[3, 0, 0, 0], [0] * 4], rtol=1e-6)


@pytest.mark.integration
@pytest.mark.parametrize('method', METHODS)
def test_contexts_of_tokens_are_centred_by_b_dec(method, rng, x64):
  W, x = small(rng)
  b_dec = rng.normal(size=32)
  f, x_hat = solve(method, W, x, 5)
  shifted = (x + b_dec).reshape(2, 5, 4, 32)
  f_4, x_hat_4 = solve(method, W, shifted, 5, b_dec)
  assert f_4.shape == (2, 5, 4, 96) and x_hat_4.shape == shifted.shape
  np.testing.assert_allclose(f_4.reshape(40, 96), f, rtol=1e-9, atol=1e-11)
  np.testing.assert_allclose(
    x_hat_4.reshape(40, 32), x_hat + b_dec, rtol=1e-9, atol=1e-11
  )
  f_1, x_hat_1 = solve(method, W, x[0], 5)
  assert f_1.shape == (96,)
  np.testing.assert_allclose(x_hat_1, x_hat[0], rtol=1e-9, atol=1e-11)


def test_an_iteration_has_one_dense_product(rng):
  rows, D, F, k = 64, 128, 4096, 8
  W, x = directions(rng, F, D), rng.normal(size=(rows, D))
  run = lambda x, W: pursuit.pursue(x, W, (k,), 'gradient')
  program = jax.jit(run).lower(x, W).compile()
  # The loop's body is counted once.
  dense = 2 * rows * D * F
  assert dense < program.cost_analysis()['flops'] < 1.2 * dense
  text = program.as_text()
  assert 'f32[64,4096]' in text and 'f32[64,8,128]' in text
  jaxpr = str(jax.make_jaxpr(run)(x, W))
  products = [line for line in jaxpr.splitlines() if 'dot_general' in line]
  assert len(products) == 3 and jaxpr.count('Precision.HIGHEST') >= 3


def test_wrong_settings_have_a_line(rng):
  W, _, x = planted(rng, rows=2, D=8, F=16)
  with pytest.raises(UserError, match="'orthogonal' is not one of 'gradient'"):
    solve('orthogonal', W, x, 3)
  with pytest.raises(UserError, match=r'k: \(3, 0\) must name numbers'):
    sweep('gradient', W, x, (3, 0))


@pytest.mark.integration
@pytest.mark.parametrize('layout', [('replicated', 1), ('tensor', 2)])
def test_the_evaluator_takes_it_for_an_sae(embedded, rng, layout):
  kind, model = layout
  W = np.float32(directions(rng, 192, 128))
  params = {'W_dec': W, 'b_dec': np.zeros(128, np.float32)}
  contexts = held_out_contexts(embedded, documents=10, rows=256)
  evaluator = Evaluator(
    embedded,
    contexts,
    tokens=256,
    batch_size=8,
    parallel='auto',
    layout=layout_of(embedded, kind, model=model),
  )
  saes = {k: (Pursuit(128, 192, k), 'mlp_out.0', params) for k in (4, 40)}
  records = {
    k: metrics.record(measured.sums, measured.fired_F)
    for k, (measured,) in evaluator.run(saes).items()
  }
  for k, record in records.items():
    assert 0.5 * k < record['l0'] <= k
  # Random directions do the better the more there are.
  assert records[40]['mse'] < 0.7 * records[4]['mse']
  assert records[40]['loss_recovered'] > records[4]['loss_recovered']
