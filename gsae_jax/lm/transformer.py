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

import flax.linen as nn
import jax
import jax.numpy as jnp

from gsae_jax.errors import UserError

Edits = Mapping[str, Callable[[jax.Array], jax.Array]]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """What distinguishes one decoder-only family from another."""

  layers: int
  width: int
  heads: int
  kv_heads: int
  head_width: int
  mlp_width: int
  vocabulary: int
  context: int
  norm: str  # 'layernorm' (with bias) or 'rmsnorm'.
  norm_eps: float
  rope_theta: float | None  # None: learned absolute positions.
  activation: str  # 'gelu' (exact) or 'silu'.
  gated_mlp: bool  # act(x W_gate) * (x W_in) rather than act(x W_in).
  attention_bias: bool
  mlp_bias: bool
  tied_embeddings: bool

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


class Norm(nn.Module):
  """LayerNorm or RMSNorm over the last axis, computed in float32."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    x = x_BLD.astype(jnp.float32)
    if self.config.norm == 'layernorm':
      x -= jnp.mean(x, -1, keepdims=True)
    x *= jax.lax.rsqrt(
      jnp.mean(x * x, -1, keepdims=True) + self.config.norm_eps
    )
    x = x.astype(x_BLD.dtype)
    x *= self.param('scale', nn.initializers.ones, x.shape[-1:])
    if self.config.norm == 'layernorm':
      x += self.param('bias', nn.initializers.zeros, x.shape[-1:])
    return x


def rope(x_BLHK: jax.Array, theta: float) -> jax.Array:
  """Rotates the pairs (k, k + K/2) by position (Su et al. 2021)."""
  half = x_BLHK.shape[-1] // 2
  frequency_K = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_LK = jnp.arange(x_BLHK.shape[1])[:, None] * frequency_K
  cos = jnp.cos(angle_LK)[None, :, None]
  sin = jnp.sin(angle_LK)[None, :, None]
  a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
  return rotated.astype(x_BLHK.dtype)


class Attention(nn.Module):
  """Causal attention with grouped key-value heads.

  `edit` is applied to the concatenated heads before the output projection.
  """

  config: TransformerConfig
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
      if c.attention_bias:
        y_BLHK += self.param(
          f'b_{name}', nn.initializers.zeros, (heads, c.head_width)
        )
      return y_BLHK

    q_BLHK = project('Q', c.heads)
    k_BLGK = project('K', c.kv_heads)
    v_BLGK = project('V', c.kv_heads)
    if c.rope_theta is not None:
      q_BLHK = rope(q_BLHK, c.rope_theta)
      k_BLGK = rope(k_BLGK, c.rope_theta)
    z_BLHK = jax.nn.dot_product_attention(
      q_BLHK, k_BLGK, v_BLGK, is_causal=True
    )
    z = self.edit(z_BLHK.reshape(*x_BLD.shape[:2], c.heads * c.head_width))
    W_O = self.param(
      'W_O',
      nn.initializers.normal((c.heads * c.head_width * 2 * c.layers) ** -0.5),
      (c.heads * c.head_width, c.width),
    )
    y_BLD = z @ W_O
    if c.attention_bias:
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

    act = {
      'gelu': lambda x: jax.nn.gelu(x, approximate=False),
      'silu': jax.nn.silu,
    }[c.activation]
    h_BLM = linear('in', x_BLD, c.width, c.mlp_width, c.width**-0.5)
    if c.gated_mlp:
      gate = linear('gate', x_BLD, c.width, c.mlp_width, c.width**-0.5)
      h_BLM = act(gate) * h_BLM
    else:
      h_BLM = act(h_BLM)
    stddev = (c.mlp_width * 2 * c.layers) ** -0.5
    return linear('out', self.edit(h_BLM), c.mlp_width, c.width, stddev)


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
    logits: bool = True,
  ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    """Runs the model.

    Args:
      ids_BL: `[B, L]` int32 token ids, L at most `config.context`.
      sites: names of the activations to return.
      edits: functions `[B, L, width] -> [B, L, width]` by site; what they
        return is what the rest of the model sees, and what `sites` reports.
      logits: False stops behind the last block that holds one of `sites`.

    Returns:
      `[B, L, V]` logits in float32 (None with `logits=False`), and the
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
    if c.rope_theta is None:
      W_pos = self.param(
        'W_pos', nn.initializers.normal(0.02), (c.context, c.width)
      )
      x_BLD += W_pos[: ids_BL.shape[1]]
    layers = c.layers
    if not logits:
      layers = max((int(s.rpartition('.')[2]) + 1 for s in sites), default=0)
    for i in range(layers):

      def at(kind, i=i):
        return lambda value: tap(f'{kind}.{i}', value)

      h = Norm(c, name=f'ln1_{i}')(x_BLD)
      x_BLD += Attention(c, at('attn_pre_linear'), name=f'attn_{i}')(h)
      h = Norm(c, name=f'ln2_{i}')(x_BLD)
      h = MLP(c, at('mlp_hidden'), name=f'mlp_{i}')(h)
      x_BLD = tap(f'resid_post.{i}', x_BLD + tap(f'mlp_out.{i}', h))
    if not logits:
      return None, taken
    x_BLD = Norm(c, name='ln_final')(x_BLD)
    if c.tied_embeddings:
      W_U = W_E.T
    else:
      W_U = self.param(
        'W_U',
        nn.initializers.normal(0.1 * c.width**-0.5),
        (c.width, c.vocabulary),
      )
    return (x_BLD @ W_U).astype(jnp.float32), taken
