"""SAEs at the start of training and after it, by the float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax import sae
from gsae_jax.sae import make_module
from tests.support import reference

D, F, B = 24, 96, 64


def activations(rng, rows=B):
  """Sparse combinations of directions, with a mean."""
  codes = rng.exponential(size=(rows, 40)) * (rng.random((rows, 40)) < 0.1)
  return (codes @ rng.normal(size=(40, D)) / 5 + 0.3).astype(np.float32)


def with_gaps(x_BD, rows, *params, gap=1e-4):
  """Returns the first `rows` on which no gate is within `gap` of its edge.

  A gate within rounding of its edge is open on one processor and shut on another,
  which changes the gradients of its feature. `params` are of one SAE or several.
  """
  nearest_B = np.full(len(x_BD), np.inf)
  for p in params:
    p = {k: np.asarray(v, np.float64) for k, v in p.items()}
    gate = 'gate' if 'W_gate' in p else 'enc'
    centred = np.asarray(x_BD, np.float64) - p['b_dec']
    z = centred @ p[f'W_{gate}']
    edges = [z + p[f'b_{gate}']]
    if 'b_mag' in p:
      mag = centred @ p['W_mag'] if 'W_mag' in p else z
      edges.append(mag * np.exp(p.get('r_mag', 0.0)) + p['b_mag'])
    for edge in edges:
      nearest_B = np.minimum(nearest_B, np.abs(edge).min(-1))
  found = x_BD[nearest_B > gap][:rows]
  assert len(found) == rows
  return found


def module_of(variant):
  architecture, options = reference.VARIANTS[variant]
  return make_module(
    sae.VARIANTS
    | {'architecture': architecture, 'width': D, 'features': F}
    | options
  )


def initial(variant):
  module = module_of(variant)
  params = module.init(jax.random.key(1), jnp.zeros((1, D)))['params']
  params = {k: np.asarray(v, np.float64) for k, v in params.items()}
  if variant == 'rescale_shift':  # It starts from a baseline.
    _, baseline = trained('relu', np.random.default_rng(5))
    params = {k: np.asarray(v) for k, v in module.start(baseline).items()}
  return module, params


def trained(variant, rng, steps=150):
  """Parameters after real training steps, in float64 by the reference."""
  module, p = initial(variant)
  architecture, options = reference.VARIANTS[variant]
  v = {k: np.zeros_like(w) for k, w in p.items()}
  for t in range(1, steps + 1):
    x = activations(rng).astype(np.float64)
    _, _, g = reference.LOSSES[architecture](p, x, 0.1, **options)
    p, v = reference.adam_step(p, g, v, t, 3e-3, unit_rows=module.unit_rows)
  return module, p
