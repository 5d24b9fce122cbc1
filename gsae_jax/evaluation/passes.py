"""Passes of the language model with and without SAEs, as pure functions.

The clean pass gives activations and last hidden states. Every other pass starts
from the former, at its site: what lies in front of it is not run again. One
comparison makes logits of all hidden states, a few positions at a time, so that
no `[B, L, V]` is held. Only rows in the mask are replaced, by the reconstruction,
by zeros or by the mean alike, and predictions are counted that are made from such
rows: other positions keep their activations.

Values are returned token by token; the host adds them up in float64.
"""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from gsae_jax.evaluation.devices import Out
from gsae_jax.evaluation.top import Top, update
from gsae_jax.lm.effects import direct_logits
from gsae_jax.lm.transformer import Transformer, unembed
from gsae_jax.sae import tiles


def clean_pass(
  module: Transformer, sites: tuple[str, ...], lm_params, ids_BL
) -> Out:
  """Keeps hidden states `[B, L, D]`, and by name what other passes start from."""
  cuts = (name for site in sites for name in module.config.cut(site))
  hidden, taken = module.apply(
    {'params': lm_params},
    ids_BL,
    sites=tuple(dict.fromkeys((*sites, *cuts))),
    output='hidden',
  )
  return Out(kept=(hidden, taken))


def mean_pass(
  module: Transformer, sites: tuple[str, ...], lm_params, ids_BL, m_BL
) -> Out:
  """Sums of activations over the mask, `[D]` for each site."""
  _, taken = module.apply(
    {'params': lm_params}, ids_BL, sites=sites, output=None
  )
  masked = lambda x_BLD: jnp.where(m_BL[..., None], x_BLD, 0)
  return Out(
    sums={
      site: jnp.sum(masked(taken[site]), (0, 1), dtype=jnp.float32)
      for site in sites
    }
  )


def _spliced(module, site, lm_params, ids_BL, m_BL, taken, new_BLD):
  """Hidden states with the rows of the mask replaced at the site."""
  x_BLD = taken[site]
  spliced_BLD = jnp.where(m_BL[..., None], new_BLD.astype(x_BLD.dtype), x_BLD)
  values = {name: taken[name] for name in module.config.cut(site)}
  values[site] = spliced_BLD
  hidden, _ = module.apply(
    {'params': lm_params},
    ids_BL,
    edits={name: lambda _, v=value: v for name, value in values.items()},
    output='hidden',
  )
  return hidden


def ablated_pass(
  module: Transformer, site: str, lm_params, ids_BL, m_BL, taken, mean_D
) -> Out:
  """The site's rows set to zero (paper 2.3), and to their mean.

  Returns:
    rows: `variance`, the squared distance from the mean.
    kept: hidden states of the two.
  """
  x_BLD = taken[site].astype(jnp.float32)
  mean_11D = mean_D[None, None]
  hidden = tuple(
    _spliced(module, site, lm_params, ids_BL, m_BL, taken, value_11D)
    for value_11D in (jnp.zeros_like(mean_11D), mean_11D)
  )
  variance_BL = jnp.sum((x_BLD - mean_11D) ** 2, -1)
  return Out(rows={'variance': jnp.where(m_BL, variance_BL, 0)}, kept=hidden)


def spliced_pass(
  module: Transformer,
  sae: nn.Module,
  site: str,
  by_tiles: bool,
  lm_params,
  ids_BL,
  m_BL,
  taken,
  sae_params,
  top: tuple[Top, jax.Array] | None,
) -> Out:
  """One SAE's reconstruction in place.

  Args:
    module: the language model.
    sae: its output has `f` and `x_hat`.
    site: where.
    by_tiles: decode only what is in use, which takes a program of one device.
    lm_params: parameters of the language model.
    ids_BL: token ids.
    m_BL: the mask.
    taken: of the clean pass.
    sae_params: of the SAE.
    top: what the contexts before this batch gave, and the numbers `[B]` of those
      of this batch; None where nobody asks for them.

  Returns:
    rows: `metrics.OF_SAE` but for the model's losses.
    sums: tokens that each feature `fired` on, `[F]`, and with `top` the sum of its
      `activation`.
    kept: hidden states, and the new `top`.
  """
  x_BLD = taken[site].astype(jnp.float32)
  applied = sae.apply({'params': sae_params}, x_BLD)
  out = cast(dict[str, jax.Array], applied)
  f_BLF, x_hat_BLD = out['f'], out['x_hat']
  if by_tiles:
    decoded = tiles.decode(f_BLF, sae_params['W_dec'], sae.precision)
    x_hat_BLD = decoded + sae_params['b_dec'][None, None]
  hidden = _spliced(module, site, lm_params, ids_BL, m_BL, taken, x_hat_BLD)
  dot_BL = jnp.sum(x_BLD * x_hat_BLD, -1)
  x2_BL = jnp.sum(x_BLD**2, -1)
  x_hat2_BL = jnp.sum(x_hat_BLD**2, -1)
  norms_BL = jnp.sqrt(x2_BL * x_hat2_BL)
  f_BLF = jnp.where(m_BL[..., None], f_BLF, 0)
  rows = {
    'l0': jnp.sum(f_BLF > 0, -1, dtype=jnp.float32),
    'error': jnp.sum((x_BLD - x_hat_BLD) ** 2, -1),
    'x_hat_squared': x_hat2_BL,
    'dot': dot_BL,
    'cosine': dot_BL / jnp.maximum(norms_BL, 1e-30),
  }
  sums = {'fired': jnp.sum(f_BLF > 0, (0, 1), dtype=jnp.float32)}
  after = None
  if top is not None:
    sums['activation'] = jnp.sum(f_BLF, (0, 1))
    after = update(*top, f_BLF)
  return Out(
    rows={name: jnp.where(m_BL, value, 0) for name, value in rows.items()},
    sums=sums,
    kept=(hidden, after),
  )


def comparison(
  module: Transformer,
  parts: int,
  most: int,
  lm_params,
  ids_BL,
  m_BL,
  clean_BLD,
  others,
) -> Out:
  """Cross-entropies of all, and the divergence of each from the clean model.

  Args:
    module: the language model.
    parts: that B is divided into beyond this program's sight.
    most: logits of a device that are held at a time, of each model.
    lm_params: its parameters.
    ids_BL: token ids.
    m_BL: the mask; predictions made from its rows are counted, the rest are 0.
    clean_BLD: hidden states of the unchanged model.
    others: tuple of hidden states to compare.

  Returns:
    rows: `clean`, `[B, L]` cross-entropy of the unchanged model; `ce` and `kl`,
      `[B, L, S]` of the others.
  """
  B, L = ids_BL.shape
  size = -(-B // parts) * L * module.config.vocabulary
  chunks = next(
    n for n in range(1, L + 1) if L % n == 0 and size <= n * most or n == L
  )
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
      hit = next_BC[..., None] == jnp.arange(log_p_BCV.shape[-1])[None, None]
      picked_BC = jnp.sum(jnp.where(hit, log_p_BCV, 0.0), -1)
      return -jnp.where(counted_BC, picked_BC, 0.0)

    log_p_BCV = log_probabilities(clean_BCD)

    def against_clean(hidden):
      log_q_BCV = log_probabilities(hidden)
      kl_BC = jnp.sum(jnp.exp(log_p_BCV) * (log_p_BCV - log_q_BCV), -1)
      kl_BC = jnp.where(counted_BC, kl_BC, 0.0)
      return {'ce': cross_entropy(log_q_BCV), 'kl': kl_BC}

    return {'clean': cross_entropy(log_p_BCV)} | jax.lax.map(
      against_clean, others_SBCD
    )

  split = map(chunked, (next_BL, counted_BL, clean_BLD, jnp.stack(others)))
  found = jax.lax.map(compare, tuple(split))

  def joined(v):  # [n, ..., B, C] -> [B, L, ...]
    v = jnp.moveaxis(v, (-2, 0, -1), (0, 1, 2))
    return v.reshape(B, L, *v.shape[3:])

  return Out(rows=jax.tree.map(joined, found))


def effects_pass(
  module: Transformer, site: str, k: int, lm_params, d_ND
) -> Out:
  """The tokens that directions at a site favour most and least.

  Returns:
    rows: `top` and `bottom`, values and token ids `[N, k]` each.
  """
  logits_NV = direct_logits(module.config, lm_params, site, d_ND)
  values, ids = jax.lax.top_k(-logits_NV, k)
  return Out(
    rows={'top': jax.lax.top_k(logits_NV, k), 'bottom': (-values, ids)}
  )
