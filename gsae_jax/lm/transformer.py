"""One decoder-only transformer; a family is a `TransformerConfig` and a table.

Axis names, here and below `gsae_jax/lm`: B contexts, L positions, D width,
H query heads, G key-value heads, K head width, M MLP width, V vocabulary.

Activations are values that the model returns, and an edit is a function that
it is given, both by site name; harvesting, splicing and ablation are therefore
one mechanism, and jit prunes what nobody asked for.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gsae_jax.errors import UserError
from gsae_jax.lm.attention import attend
from gsae_jax.lm.rotary import Rope, rotate

Edits = Mapping[str, Callable[[jax.Array], jax.Array]]

ACTIVATIONS = {
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'silu': jax.nn.silu,
  'relu': jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """What may differ from block to block of one model.

  Attributes:
    rope: rotary positions, if any.
    window: positions that a query sees, its own included; None is all.
    scale: of attention scores.
  """

  rope: Rope | None
  window: int | None
  scale: float


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """What distinguishes one decoder-only model from another."""

  blocks: tuple[BlockConfig, ...]
  width: int
  heads: int
  kv_heads: int
  head_width: int
  mlp_width: int
  vocabulary: int
  context: int
  norm: str  # 'layernorm' (with bias), 'rmsnorm', or 'rmsnorm_offset' (1 + w).
  norm_eps: float
  activation: str  # One of ACTIVATIONS.
  gated_mlp: bool  # act(x W_gate) * (x W_in) rather than act(x W_in).
  tied_embeddings: bool
  learned_positions: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  unembed_bias: bool = False
  parallel: bool = False  # Attention and MLP read the same residual stream.
  post_norms: bool = False  # Norms behind attention and MLP, too.
  qk_norm: bool = False  # RMSNorm of every query and key.
  embedding_scale: float | None = None
  attention_cap: float | None = None
  logit_cap: float | None = None

  @property
  def layers(self) -> int:
    return len(self.blocks)

  def site_widths(self) -> dict[str, int]:
    """Every site of the model, in the order of computation, with its width."""
    kinds = {
      'attn_pre_linear': self.heads * self.head_width,
      'mlp_hidden': self.mlp_width,
      'mlp_out': self.width,
      'resid_post': self.width,
    }
    return {
      f'{kind}.{layer}': width
      for layer in range(self.layers)
      for kind, width in kinds.items()
    }

  def check_site(self, site: str, field: str = 'sites') -> int:
    """Returns the width at `site`.

    Raises:
      UserError: the model has no such site; names the nearest thing to do.
    """
    widths = self.site_widths()
    if site in widths:
      return widths[site]
    kinds = sorted({name.split('.')[0] for name in widths})
    kind, _, layer = site.partition('.')
    if kind in kinds and re.fullmatch(r'\d+', layer):
      raise UserError(
        f'{field}: {site!r} is past the last layer; this language model has '
        f'layers 0 to {self.layers - 1}'
      )
    raise UserError(
      f'{field}: no site {site!r}; a site is one of {", ".join(kinds)}, a dot '
      f'and a layer, such as {kinds[-1]}.0'
    )

  def blocks_for(self, sites: tuple[str, ...]) -> int:
    """How many blocks must run until all of `sites` are known."""
    return max((int(s.rpartition('.')[2]) + 1 for s in sites), default=0)


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
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
    if self.kind == 'rmsnorm_offset':  # Gemma rounds last.
      return (x * (1 + scale.astype(jnp.float32))).astype(x_BLD.dtype)
    x = x.astype(x_BLD.dtype) * scale
    if self.kind == 'layernorm':
      x += self.param('bias', nn.initializers.zeros, x.shape[-1:])
    return x


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
        y_BLHK += self.param(
          f'b_{name}', nn.initializers.zeros, (heads, c.head_width)
        )
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
      y_BLD += self.param('b_O', nn.initializers.zeros, (c.width,))
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
        y += self.param(f'b_{name}', nn.initializers.zeros, (outputs,))
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
  a residual stream's summands are the summands.
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
    middle_BLD = x_BLD + attended
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
      x_BLD += W_pos[: ids_BL.shape[1]]
    for i in range(c.layers if output else c.blocks_for(sites)):

      def at(kind, value, i=i):
        return tap(f'{kind}.{i}', value)

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
  if config.tied_embeddings:
    logits = jnp.einsum('...D,VD->...V', hidden, params['W_E'])
  else:
    logits = hidden @ params['W_U']
  if config.unembed_bias:
    logits += params['b_U']
  logits = logits.astype(jnp.float32)
  if config.logit_cap is not None:
    logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
  return logits
