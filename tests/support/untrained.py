"""SAEs of the embedded model that nobody trained."""

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax.sae import ARCHITECTURES

SITE, WIDTH, FEATURES, LENGTH, TOKENS = 'mlp_out.0', 128, 192, 32, 700


def make_saes():
  """Returns a gated and a ReLU SAE with random biases, by name."""
  rng = np.random.default_rng(1)
  found = {}
  for name in ('gated', 'relu'):
    module = ARCHITECTURES[name](WIDTH, FEATURES)
    p = module.init(jax.random.key(0), jnp.zeros((1, WIDTH)))['params']
    p = {k: np.asarray(v) for k, v in p.items()}
    for k in p:
      if k.startswith('b_') or k == 'r_mag':
        p[k] = rng.normal(size=p[k].shape).astype(np.float32) * 0.3 - 0.2
    found[name] = (module, SITE, p)
  return found


def leave_gaps(saes, x_ND):
  """Shifts biases so that no gate is close to where it opens.

  Rounding then opens no gate that it closes on another processor: every feature's
  threshold is in the widest gap between the pre-activations around it. For a
  thousand rows that is 1e-3 to 1e-2; rounding changes them by 1e-6.
  """
  for _, _, p in saes.values():
    x = np.asarray(x_ND, np.float64) - p['b_dec']
    if 'W_enc' in p:
      thresholds = {'b_enc': x @ p['W_enc']}
    else:
      z = x @ p['W_gate']
      thresholds = {'b_gate': z, 'b_mag': np.exp(p['r_mag']) * z}
    for name, z_NF in thresholds.items():
      p[name] = _shifted(z_NF, p[name])


def _shifted(z_NF, b_F, nearest=20):
  """Biases near `b_F`, in the middle of gaps."""
  found = np.empty_like(b_F)
  for feature, b in enumerate(b_F):
    z = np.sort(z_NF[:, feature])
    at = np.searchsorted(z, -b)
    z = z[max(0, at - nearest) : at + nearest]
    widest = np.argmax(np.diff(z))
    assert z[widest + 1] - z[widest] > 2e-4
    found[feature] = -(z[widest] + z[widest + 1]) / 2
  return found
