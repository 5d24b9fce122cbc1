"""What distinguishes one decoder-only model from another, and its sites.

Axis names, here and below `gsae_jax/lm`: B contexts, L positions, D width,
H query heads, G key-value heads, K head width, M MLP width, V vocabulary.
"""

import dataclasses
import re

import jax

from gsae_jax.errors import UserError
from gsae_jax.lm.rotary import Rope

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

  def cut(self, site: str) -> tuple[str, ...]:
    """Values that with that at `site` decide all that comes behind it.

    Edits that put them back spare a pass what lies in front of the site: jit
    prunes it. (Attention in front of an MLP of the same block, and an MLP beside
    the attention in parallel blocks, is run again where it must be.)
    """
    kind, _, layer = site.rpartition('.')
    if kind in ('mlp_hidden', 'mlp_out'):
      return (f'resid_mid.{layer}',)
    if kind == 'attn_pre_linear' and int(layer) > 0:
      return (f'resid_post.{int(layer) - 1}',)
    return ()

  def blocks_for(self, sites: tuple[str, ...]) -> int:
    """How many blocks must run until all of `sites` are known."""
    return max((int(s.rpartition('.')[2]) + 1 for s in sites), default=0)
