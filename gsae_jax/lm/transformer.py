"""One decoder-only transformer; a family is a `TransformerConfig` and a table.

Activations are values that the model returns, and an edit is a function that
it is given, both by site name; harvesting, splicing and ablation are therefore
one mechanism, and jit prunes what nobody asked for.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gsae_jax.lm.architecture import ACTIVATIONS, BlockConfig, TransformerConfig
from gsae_jax.lm.attention import attend
from gsae_jax.lm.products import as_precise_as, summed_in_float32
from gsae_jax.lm.rotary import rotate

Edits = Mapping[str, Callable[[jax.Array], jax.Array]]


class Norm(nn.Module):
  """A norm over the last axis, computed in float32."""

  kind: str
  eps: float

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    x = x_BLD.astype(jnp.float32)
    if self.kind == 'layernorm':
      x -= jnp.mean(x, -1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps)
    of_width = lambda name, start: jnp.expand_dims(
      self.param(name, start, x.shape[-1:]), range(x.ndim - 1)
    )
    scale = of_width('scale', nn.initializers.ones)
    if self.kind == 'rmsnorm':  # Llama rounds in front of the scale.
      return x.astype(x_BLD.dtype) * scale
    scale = scale.astype(jnp.float32)
    if self.kind == 'rmsnorm_offset':
      return (x * (1 + scale)).astype(x_BLD.dtype)
    bias = of_width('bias', nn.initializers.zeros)
    return (x * scale + bias.astype(jnp.float32)).astype(x_BLD.dtype)


class Attention(nn.Module):
  """Causal attention with grouped key-value heads.

  `edit` is applied to the concatenated heads before the output projection.
  """

  config: TransformerConfig
  block: BlockConfig
  edit: Callable[[jax.Array], jax.Array]

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    c = self.config

    def project(name: str, heads: int) -> jax.Array:
      W_DHK = self.param(
        f'W_{name}',
        nn.initializers.normal(c.width**-0.5),
        (c.width, heads, c.head_width),
      )
      y_BLHK = jnp.einsum('BLD,DHK->BLHK', x_BLD, W_DHK)
      if c.qkv_bias:
        b_HK = self.param(
          f'b_{name}', nn.initializers.zeros, (heads, c.head_width)
        )
        y_BLHK += b_HK[None, None]
      return y_BLHK

    def place(name: str, x_BLHK: jax.Array) -> jax.Array:
      if c.qk_norm:
        x_BLHK = Norm(c.norm, c.norm_eps, name=f'{name}_norm')(x_BLHK)
      return (
        x_BLHK if self.block.rope is None else rotate(x_BLHK, self.block.rope)
      )

    z_BLHK = attend(
      place('q', project('Q', c.heads)),
      place('k', project('K', c.kv_heads)),
      project('V', c.kv_heads),
      scale=self.block.scale,
      window=self.block.window,
      cap=c.attention_cap,
    )
    z = self.edit(z_BLHK.reshape(*x_BLD.shape[:2], c.heads * c.head_width))
    W_O = self.param(
      'W_O',
      nn.initializers.normal((c.heads * c.head_width * 2 * c.layers) ** -0.5),
      (c.heads * c.head_width, c.width),
    )
    y_BLD = z @ W_O
    if c.out_bias:
      b_D = self.param('b_O', nn.initializers.zeros, (c.width,))
      y_BLD += b_D[None, None]
    return y_BLD


class MLP(nn.Module):
  """`edit` is applied after the non-linearity, before the output matrix."""

  config: TransformerConfig
  edit: Callable[[jax.Array], jax.Array]

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    c = self.config

    def linear(name, x, inputs, outputs, stddev):
      y = x @ self.param(
        f'W_{name}', nn.initializers.normal(stddev), (inputs, outputs)
      )
      if c.mlp_bias:
        b = self.param(f'b_{name}', nn.initializers.zeros, (outputs,))
        y += b[None, None]
      return y

    act = ACTIVATIONS[c.activation]
    h_BLM = linear('in', x_BLD, c.width, c.mlp_width, c.width**-0.5)
    if c.gated_mlp:
      gate = linear('gate', x_BLD, c.width, c.mlp_width, c.width**-0.5)
      h_BLM = act(gate) * h_BLM
    else:
      h_BLM = act(h_BLM)
    stddev = (c.mlp_width * 2 * c.layers) ** -0.5
    return linear('out', self.edit(h_BLM), c.mlp_width, c.width, stddev)


class Block(nn.Module):
  """Attention and MLP, each of which adds to the residual stream.

  `tap` is called with every site's kind and value, and returns what to go on
  with. What a norm behind the MLP makes of its output is `mlp_out`: the sites of
  a residual stream's summands are the summands. `resid_mid` is no site of SAEs; it
  is where a pass can start again (`TransformerConfig.cut`).
  """

  config: TransformerConfig
  index: int
  tap: Callable[[str, jax.Array], jax.Array]

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    c = self.config
    at = lambda kind: lambda value: self.tap(kind, value)
    norm = lambda name: Norm(c.norm, c.norm_eps, name=name)
    attention = Attention(
      c, c.blocks[self.index], at('attn_pre_linear'), name='attn'
    )
    mlp = MLP(c, at('mlp_hidden'), name='mlp')
    attended = attention(norm('ln1')(x_BLD))
    if c.post_norms:
      attended = norm('ln1_post')(attended)
    middle_BLD = self.tap('resid_mid', x_BLD + attended)
    h_BLD = mlp(norm('ln2')(x_BLD if c.parallel else middle_BLD))
    if c.post_norms:
      h_BLD = norm('ln2_post')(h_BLD)
    h_BLD = self.tap('mlp_out', h_BLD)
    return self.tap('resid_post', middle_BLD + h_BLD)


class Transformer(nn.Module):
  """The language model."""

  config: TransformerConfig

  @nn.compact
  def __call__(
    self,
    ids_BL: jax.Array,
    *,
    sites: tuple[str, ...] = (),
    edits: Edits | None = None,
    output: str | None = 'logits',
  ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    """Runs the model.

    Args:
      ids_BL: `[B, L]` int32 token ids, L at most `config.context`.
      sites: names of the activations to return.
      edits: functions `[B, L, width] -> [B, L, width]` by site; what they
        return is what the rest of the model sees, and what `sites` reports.
      output: 'logits'; 'hidden', what `unembed` makes logits of; or None, which
        stops behind the last block that holds one of `sites` and needs no
        parameters of later ones.

    Returns:
      `[B, L, V]` logits in float32, or `[B, L, D]`, or None; and the
      activations by site, each `[B, L, width]`.
    """
    c = self.config
    edits = edits or {}
    taken = {}

    def tap(name: str, value: jax.Array) -> jax.Array:
      if name in edits:
        value = edits[name](value)
      if name in sites:
        taken[name] = value
      return value

    W_E = self.param(
      'W_E', nn.initializers.normal(1.0), (c.vocabulary, c.width)
    )
    x_BLD = W_E[ids_BL]
    if c.embedding_scale is not None:  # Gemma rounds it to the activations'.
      x_BLD *= jnp.asarray(c.embedding_scale, x_BLD.dtype)
    if c.learned_positions:
      W_pos = self.param(
        'W_pos', nn.initializers.normal(0.02), (c.context, c.width)
      )
      x_BLD += W_pos[None, : ids_BL.shape[1]]
    for i in range(c.layers if output else c.blocks_for(sites)):

      def at(kind, value, i=i):
        return tap(f'{kind}.{i}', value)

      with as_precise_as(x_BLD.dtype):
        x_BLD = Block(c, i, at, name=f'block_{i}')(x_BLD)
    if output is None:
      return None, taken
    x_BLD = Norm(c.norm, c.norm_eps, name='ln_final')(x_BLD)
    if not c.tied_embeddings:
      self.param(
        'W_U',
        nn.initializers.normal(0.1 * c.width**-0.5),
        (c.width, c.vocabulary),
      )
    if c.unembed_bias:
      self.param('b_U', nn.initializers.zeros, (c.vocabulary,))
    if output == 'hidden':
      return x_BLD, taken
    return unembed(c, self.variables['params'], x_BLD), taken


def unembed(
  config: TransformerConfig, params: Mapping[str, Any], hidden: jax.Array
) -> jax.Array:
  """Logits `[..., V]` in float32 of the hidden states `[..., D]`."""
  tied = config.tied_embeddings
  with as_precise_as(hidden.dtype):
    logits = summed_in_float32(
      '...D,VD->...V' if tied else '...D,DV->...V',
      hidden,
      params['W_E' if tied else 'W_U'],
    )
  if config.unembed_bias:
    b_V = params['b_U'].astype(jnp.float32)
    logits += jnp.expand_dims(b_V, range(logits.ndim - 1))
  if config.logit_cap is not None:
    logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
  return logits
