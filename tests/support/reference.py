"""Float64 NumPy, written from the paper's equations: the oracle of the tests."""

import numpy as np


def gated_loss_and_gradients(
  p,
  x,
  l1,
  *,
  encoder='tied',
  freeze_aux_decoder=True,
  centre_stop_gradient=False,
  sparsity='l1',
  error_scale=1.0,
):
  """Eq. 8 and its variants, sums over D, means over B, derived by hand.

  Args:
    p: dictionary of float64 parameters.
    x: `[B, D]` float64.
    l1: lambda.
    encoder: 'tied' (Eq. 7), 'no_r_mag' or 'untied'.
    freeze_aux_decoder: the auxiliary decoder, and norms in the penalty, take no
      gradient.
    centre_stop_gradient: nor does `b_dec` from the auxiliary encoder.
    sparsity: 'l1', or 'decoder_norm_l1'.
    error_scale: of both squared errors.

  Returns:
    the loss, its three terms, and the gradient of each parameter.
  """
  B = len(x)
  centred = x - p['b_dec']
  scale_F = np.exp(p['r_mag']) if encoder == 'tied' else 1.0
  W_mag = p['W_mag'] if encoder == 'untied' else p['W_gate'] * scale_F
  pi_gate = centred @ p['W_gate'] + p['b_gate']
  pi_mag = centred @ W_mag + p['b_mag']
  f_gate = (pi_gate > 0).astype(float)
  f = f_gate * np.maximum(pi_mag, 0)
  g = np.maximum(pi_gate, 0)
  e = f @ p['W_dec'] + p['b_dec'] - x
  e_aux = g @ p['W_dec'] + p['b_dec'] - x
  norm_F = np.linalg.norm(p['W_dec'], axis=1)
  weight_F = norm_F if sparsity == 'decoder_norm_l1' else np.ones_like(norm_F)
  terms = {
    'reconstruction': (e**2).sum() / B,
    'sparsity': (g * weight_F).sum() / B,
    'auxiliary': (e_aux**2).sum() / B,
  }
  d_e = 2 * error_scale * e / B
  d_e_aux = 2 * error_scale * e_aux / B
  d_pi_mag = (d_e @ p['W_dec'].T) * f_gate * (pi_mag > 0)
  d_pi_aux = (d_e_aux @ p['W_dec'].T) * (pi_gate > 0)
  d_pi_sparse = l1 / B * weight_F * (pi_gate > 0)
  d_pi_gate = d_pi_aux + d_pi_sparse
  d_W_mag = centred.T @ d_pi_mag
  # What reaches b_dec through the encoders.
  moving = d_pi_sparse if centre_stop_gradient else d_pi_gate
  d_centred = d_pi_mag @ W_mag.T + moving @ p['W_gate'].T
  gradients = {
    'W_gate': centred.T @ d_pi_gate,
    'b_gate': d_pi_gate.sum(0),
    'b_mag': d_pi_mag.sum(0),
    'W_dec': f.T @ d_e,
    'b_dec': d_e.sum(0) - d_centred.sum(0),
  }
  if encoder == 'untied':
    gradients['W_mag'] = d_W_mag
  else:
    gradients['W_gate'] += d_W_mag * scale_F
  if encoder == 'tied':
    gradients['r_mag'] = (d_W_mag * W_mag).sum(0)
  if not freeze_aux_decoder:
    gradients['W_dec'] += g.T @ d_e_aux
    gradients['b_dec'] += d_e_aux.sum(0)
    if sparsity == 'decoder_norm_l1':
      direction = p['W_dec'] / norm_F[:, None]
      gradients['W_dec'] += l1 * g.mean(0)[:, None] * direction
  error = terms['reconstruction'] + terms['auxiliary']
  return error_scale * error + l1 * terms['sparsity'], terms, gradients


def relu_loss_and_gradients(p, x, l1, *, sparsity='l1', error_scale=1.0):
  """Eq. 4, as above; the norms in the penalty are never frozen."""
  B = len(x)
  centred = x - p['b_dec']
  pi = centred @ p['W_enc'] + p['b_enc']
  f = np.maximum(pi, 0)
  e = f @ p['W_dec'] + p['b_dec'] - x
  norm_F = np.linalg.norm(p['W_dec'], axis=1)
  weight_F = norm_F if sparsity == 'decoder_norm_l1' else np.ones_like(norm_F)
  terms = {
    'reconstruction': (e**2).sum() / B,
    'sparsity': (f * weight_F).sum() / B,
    'auxiliary': 0.0,
  }
  d_e = 2 * error_scale * e / B
  d_pi = (d_e @ p['W_dec'].T + l1 * weight_F / B) * (pi > 0)
  gradients = {
    'W_enc': centred.T @ d_pi,
    'b_enc': d_pi.sum(0),
    'W_dec': f.T @ d_e,
    'b_dec': d_e.sum(0) - (d_pi @ p['W_enc'].T).sum(0),
  }
  if sparsity == 'decoder_norm_l1':
    direction = p['W_dec'] / norm_F[:, None]
    gradients['W_dec'] += l1 * f.mean(0)[:, None] * direction
  loss = error_scale * terms['reconstruction'] + l1 * terms['sparsity']
  return loss, terms, gradients


def rescale_shift_loss_and_gradients(p, x, l1, *, error_scale=1.0):
  """Section 5.2: r_mag and b_mag on top of a frozen baseline."""
  del l1
  B = len(x)
  z = (x - p['b_dec']) @ p['W_enc']
  gate = z + p['b_enc'] > 0
  pi_mag = np.exp(p['r_mag']) * z + p['b_mag']
  f = gate * np.maximum(pi_mag, 0)
  e = f @ p['W_dec'] + p['b_dec'] - x
  d_pi = (2 * error_scale * e / B @ p['W_dec'].T) * gate * (pi_mag > 0)
  terms = {
    'reconstruction': (e**2).sum() / B,
    'sparsity': 0.0,
    'auxiliary': 0.0,
  }
  gradients = {
    'r_mag': (d_pi * np.exp(p['r_mag']) * z).sum(0),
    'b_mag': d_pi.sum(0),
  }
  return error_scale * terms['reconstruction'], terms, gradients


LOSSES = {
  'gated': gated_loss_and_gradients,
  'relu': relu_loss_and_gradients,
  'rescale_shift': rescale_shift_loss_and_gradients,
}


def adam_step(
  p, gradients, second_moments, t, learning_rate, *, unit_rows=True
):
  """Adam(0, 0.999, 1e-8), step t >= 1, of the parameters with a gradient.

  With `unit_rows`, on projected gradients, and decoder rows of norm 1 after it.
  """
  g = dict(gradients)
  if unit_rows:
    W = p['W_dec']
    g['W_dec'] = g['W_dec'] - (g['W_dec'] * W).sum(1, keepdims=True) * W
  new, v_new = dict(p), {}
  for name in g:
    v = 0.999 * second_moments[name] + 0.001 * g[name] ** 2
    v_hat = v / (1 - 0.999**t)
    new[name] = p[name] - learning_rate * g[name] / (np.sqrt(v_hat) + 1e-8)
    v_new[name] = v
  if unit_rows:
    norms = np.linalg.norm(new['W_dec'], axis=1, keepdims=True)
    new['W_dec'] = new['W_dec'] / norms
  return new, v_new


# Every variant of the paper that a config offers: architecture and options.
VARIANTS = {
  'gated': ('gated', {}),
  'unfrozen': ('gated', {'freeze_aux_decoder': False}),
  'no_r_mag': ('gated', {'encoder': 'no_r_mag'}),
  'untied': ('gated', {'encoder': 'untied'}),
  'centre': ('gated', {'centre_stop_gradient': True}),
  'centre_unfrozen': (
    'gated',
    {'centre_stop_gradient': True, 'freeze_aux_decoder': False},
  ),
  'norms_frozen': ('gated', {'sparsity': 'decoder_norm_l1'}),
  'norms_free': (
    'gated',
    {'sparsity': 'decoder_norm_l1', 'freeze_aux_decoder': False},
  ),
  'untied_norms_free': (
    'gated',
    {
      'encoder': 'untied',
      'sparsity': 'decoder_norm_l1',
      'freeze_aux_decoder': False,
    },
  ),
  'relu': ('relu', {}),
  'relu_norms': ('relu', {'sparsity': 'decoder_norm_l1'}),
  'rescale_shift': ('rescale_shift', {}),
}
