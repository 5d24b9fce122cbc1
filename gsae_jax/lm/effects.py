"""What directions at a site do to the logits, the layers between left out."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax.lm.architecture import TransformerConfig
from gsae_jax.lm.products import as_precise_as


def direct_logits(
  config: TransformerConfig,
  params: Mapping[str, Any],
  site: str,
  d_ND: jax.Array,
) -> jax.Array:
  """Logits `[N, V]` that each direction adds, up to a factor that is common to all.

  A direction goes through the output matrix of its site's layer, if it has one,
  to the residual stream, and from there through the last norm's weights to the
  vocabulary; what norms divide by is left out, and so is the mean over the
  vocabulary, which changes no probability.

  Args:
    config: the language model's.
    params: its parameters.
    site: where the directions are.
    d_ND: `[N, width]`, such as rows of `W_dec`.
  """
  kind, _, layer = site.rpartition('.')
  block = params[f'block_{layer}']
  d_ND = d_ND.astype(jnp.float32)

  def scaled(d_ND, norm):
    scale_1D = norm['scale'].astype(jnp.float32)[None]
    if config.norm == 'layernorm':
      d_ND = d_ND - jnp.mean(d_ND, -1, keepdims=True)
    if config.norm == 'rmsnorm_offset':
      scale_1D += 1
    return d_ND * scale_1D

  outputs = {
    'attn_pre_linear': ('attn', 'W_O', 'ln1_post'),
    'mlp_hidden': ('mlp', 'W_out', 'ln2_post'),
  }
  with as_precise_as(jnp.float32):
    if kind in outputs:
      part, name, norm = outputs[kind]
      d_ND = d_ND @ block[part][name].astype(jnp.float32)
      if config.post_norms:
        d_ND = scaled(d_ND, block[norm])
    d_ND = scaled(d_ND, params['ln_final'])
    tied = config.tied_embeddings
    W = params['W_E' if tied else 'W_U'].astype(jnp.float32)
    logits_NV = d_ND @ (W.T if tied else W)
  return logits_NV - jnp.mean(logits_NV, -1, keepdims=True)
