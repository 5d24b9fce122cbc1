"""Float64 NumPy, written from the paper's equations: the oracle of the tests."""

import numpy as np


def gated_loss_and_gradients(p, x, l1):
  """Eq. 8 with tied weights (Eq. 7), sums over D, means over B, by hand.

  Args:
    p: dictionary of float64 parameters.
    x: `[B, D]` float64.
    l1: lambda.

  Returns:
    the loss, its three terms, and the gradient of each parameter.
  """
  B = len(x)
  centred = x - p['b_dec']
  W_mag = p['W_gate'] * np.exp(p['r_mag'])
  pi_gate = centred @ p['W_gate'] + p['b_gate']
  pi_mag = centred @ W_mag + p['b_mag']
  f_gate = (pi_gate > 0).astype(float)
  f_mag = np.maximum(pi_mag, 0)
  f = f_gate * f_mag
  g = np.maximum(pi_gate, 0)
  e = f @ p['W_dec'] + p['b_dec'] - x
  e_aux = g @ p['W_dec'] + p['b_dec'] - x
  terms = {
    'reconstruction': (e**2).sum() / B,
    'sparsity': g.sum() / B,
    'auxiliary': (e_aux**2).sum() / B,
  }
  d_e = 2 * e / B
  d_pi_mag = (d_e @ p['W_dec'].T) * f_gate * (pi_mag > 0)
  # The auxiliary decoder is frozen: it passes gradients on and takes none.
  d_pi_gate = (2 * e_aux / B @ p['W_dec'].T + l1 / B) * (pi_gate > 0)
  d_W_mag = centred.T @ d_pi_mag
  d_centred = d_pi_mag @ W_mag.T + d_pi_gate @ p['W_gate'].T
  gradients = {
    'W_gate': centred.T @ d_pi_gate + d_W_mag * np.exp(p['r_mag']),
    'b_gate': d_pi_gate.sum(0),
    'r_mag': (d_W_mag * W_mag).sum(0),
    'b_mag': d_pi_mag.sum(0),
    'W_dec': f.T @ d_e,
    'b_dec': d_e.sum(0) - d_centred.sum(0),
  }
  loss = terms['reconstruction'] + l1 * terms['sparsity'] + terms['auxiliary']
  return loss, terms, gradients


def relu_loss_and_gradients(p, x, l1):
  """Eq. 4, as above."""
  B = len(x)
  centred = x - p['b_dec']
  pi = centred @ p['W_enc'] + p['b_enc']
  f = np.maximum(pi, 0)
  e = f @ p['W_dec'] + p['b_dec'] - x
  terms = {
    'reconstruction': (e**2).sum() / B,
    'sparsity': f.sum() / B,
    'auxiliary': 0.0,
  }
  d_e = 2 * e / B
  d_pi = (d_e @ p['W_dec'].T + l1 / B) * (pi > 0)
  gradients = {
    'W_enc': centred.T @ d_pi,
    'b_enc': d_pi.sum(0),
    'W_dec': f.T @ d_e,
    'b_dec': d_e.sum(0) - (d_pi @ p['W_enc'].T).sum(0),
  }
  return terms['reconstruction'] + l1 * terms['sparsity'], terms, gradients


def adam_step(p, gradients, second_moments, t, learning_rate):
  """Adam(0, 0.999, 1e-8) on projected gradients, then unit rows; step t >= 1."""
  W = p['W_dec']
  g = dict(gradients)
  g['W_dec'] = g['W_dec'] - (g['W_dec'] * W).sum(1, keepdims=True) * W
  new, v_new = {}, {}
  for name in p:
    v = 0.999 * second_moments[name] + 0.001 * g[name] ** 2
    v_hat = v / (1 - 0.999**t)
    new[name] = p[name] - learning_rate * g[name] / (np.sqrt(v_hat) + 1e-8)
    v_new[name] = v
  norms = np.linalg.norm(new['W_dec'], axis=1, keepdims=True)
  new['W_dec'] = new['W_dec'] / norms
  return new, v_new
