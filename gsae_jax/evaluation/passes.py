"""Passes of the language model with and without SAEs, as pure functions.

The clean pass gives activations and last hidden states; each spliced pass starts
from the former; and one comparison makes logits of all hidden states, a few
positions at a time, so that no `[B, L, V]` is held. Only rows in the mask are
replaced, by the reconstruction or by zeros alike, and predictions are counted
that are made from such rows: special tokens keep their activations.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gsae_jax.lm.transformer import Transformer, unembed

# Logits of a device that are held at a time, of each model that is compared.
_LOGITS = 2**25


def clean_pass(module: Transformer, sites: tuple[str, ...], lm_params, ids_BL):
  """Hidden states `[B, L, D]` and activations by site, unchanged."""
  return module.apply(
    {'params': lm_params}, ids_BL, sites=sites, output='hidden'
  )


def ablated_pass(module: Transformer, site: str, lm_params, ids_BL, m_BL):
  """Hidden states with the site's rows set to zero (paper 2.3)."""
  zero = lambda x_BLD: jnp.where(m_BL[..., None], 0, x_BLD)
  hidden, _ = module.apply(
    {'params': lm_params}, ids_BL, edits={site: zero}, output='hidden'
  )
  return hidden


def spliced_pass(
  module: Transformer,
  sae: nn.Module,
  site: str,
  lm_params,
  ids_BL,
  m_BL,
  x_BLD,
  sae_params,
):
  """Sums of one SAE, and hidden states with its reconstruction in place."""
  x_BLD = x_BLD.astype(jnp.float32)
  out = sae.apply({'params': sae_params}, x_BLD)
  f_BLF, x_hat_BLD = out['f'], out['x_hat']

  def splice(original_BLD):
    new_BLD = x_hat_BLD.astype(original_BLD.dtype)
    return jnp.where(m_BL[..., None], new_BLD, original_BLD)

  hidden, _ = module.apply(
    {'params': lm_params}, ids_BL, edits={site: splice}, output='hidden'
  )
  total = lambda value_BL: jnp.sum(jnp.where(m_BL, value_BL, 0.0))
  dot_BL = jnp.sum(x_BLD * x_hat_BLD, -1)
  x2_BL = jnp.sum(x_BLD**2, -1)
  x_hat2_BL = jnp.sum(x_hat_BLD**2, -1)
  norms_BL = jnp.sqrt(x2_BL * x_hat2_BL)
  fired_BLF = (f_BLF > 0) & m_BL[..., None]
  sums = {
    'tokens': jnp.sum(m_BL, dtype=jnp.float32),
    'l0': jnp.sum(fired_BLF, dtype=jnp.float32),
    'fired': jnp.sum(fired_BLF, (0, 1), dtype=jnp.float32),
    'error': total(jnp.sum((x_BLD - x_hat_BLD) ** 2, -1)),
    'x': jnp.sum(jnp.where(m_BL[..., None], x_BLD, 0.0), (0, 1)),
    'x_squared': total(x2_BL),
    'x_hat_squared': total(x_hat2_BL),
    'dot': total(dot_BL),
    'cosine': total(dot_BL / jnp.maximum(norms_BL, 1e-30)),
  }
  return sums, hidden


def comparison(
  module: Transformer, parts: int, lm_params, ids_BL, m_BL, clean_BLD, others
):
  """Cross-entropies of all, and the divergence of each from the clean model.

  Args:
    module: the language model.
    parts: that B is divided into beyond this program's sight.
    lm_params: its parameters.
    ids_BL: token ids.
    m_BL: the mask; predictions made from its rows are counted.
    clean_BLD: hidden states of the unchanged model.
    others: tuple of hidden states to compare.

  Returns:
    sums: `predictions`, `ce` of the clean model, and for each other one
    `other_ce` and `kl`, `[S]`.
  """
  B, L = ids_BL.shape
  size = -(-B // parts) * L * module.config.vocabulary
  chunks = next(
    n for n in range(1, L + 1) if L % n == 0 and size <= n * _LOGITS or n == L
  )
  # Nothing is predicted from a context's last position.
  counted_BL = m_BL.at[:, -1].set(False)
  next_BL = jnp.roll(ids_BL, -1, axis=1)

  def chunked(x):  # Position first, and C of them at a time: [n, ..., C, ...].
    at = x.ndim - 2 if x.ndim > 2 else 1
    shape = (*x.shape[:at], chunks, L // chunks, *x.shape[at + 1 :])
    return jnp.moveaxis(x.reshape(shape), at, 0)

  def compare(chunk):
    next_BC, counted_BC, clean_BCD, others_SBCD = chunk

    def log_probabilities(hidden):
      return jax.nn.log_softmax(unembed(module.config, lm_params, hidden))

    def cross_entropy(log_p_BCV):
      # A sum, because the vocabulary may be divided over devices.
      hit = next_BC[..., None] == jnp.arange(log_p_BCV.shape[-1])
      picked_BC = jnp.sum(jnp.where(hit, log_p_BCV, 0.0), -1)
      return -jnp.sum(jnp.where(counted_BC, picked_BC, 0.0))

    log_p_BCV = log_probabilities(clean_BCD)

    def against_clean(hidden):
      log_q_BCV = log_probabilities(hidden)
      kl_BC = jnp.sum(jnp.exp(log_p_BCV) * (log_p_BCV - log_q_BCV), -1)
      kl = jnp.sum(jnp.where(counted_BC, kl_BC, 0.0))
      return {'other_ce': cross_entropy(log_q_BCV), 'kl': kl}

    return {
      'ce': cross_entropy(log_p_BCV),
      'predictions': jnp.sum(counted_BC, dtype=jnp.float32),
    } | jax.lax.map(against_clean, others_SBCD)

  split = map(chunked, (next_BL, counted_BL, clean_BLD, jnp.stack(others)))
  sums = jax.lax.map(compare, tuple(split))
  return jax.tree.map(lambda v: jnp.sum(v, 0), sums)
