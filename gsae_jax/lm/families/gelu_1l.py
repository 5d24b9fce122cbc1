"""GELU-1L and its like, in TransformerLens's names: pre-LayerNorm, exact GELU,
learned positions, untied unembedding (Nanda 2022). The embedded model is one.
"""

from gsae_jax.lm.architecture import BlockConfig, TransformerConfig
from gsae_jax.lm.families.hugging_face import Table, same

MODEL_TYPES = ('gelu_1l',)


def config(raw: dict) -> TransformerConfig:
  block = BlockConfig(None, None, raw['d_head'] ** -0.5)
  return TransformerConfig(
    blocks=(block,) * raw['n_layers'],
    width=raw['d_model'],
    heads=raw['n_heads'],
    kv_heads=raw['n_heads'],
    head_width=raw['d_head'],
    mlp_width=raw['d_mlp'],
    vocabulary=raw['d_vocab'],
    context=raw['n_ctx'],
    norm='layernorm',
    norm_eps=raw['eps'],
    activation='gelu',
    gated_mlp=False,
    tied_embeddings=False,
    learned_positions=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    unembed_bias=raw.get('unembed_bias', False),
  )


def weights(c: TransformerConfig) -> Table:
  table: Table = {
    'W_E': ('embed.W_E', same),
    'W_pos': ('pos_embed.W_pos', same),
    'ln_final/scale': ('ln_final.w', same),
    'ln_final/bias': ('ln_final.b', same),
    'W_U': ('unembed.W_U', same),
  }
  if c.unembed_bias:
    table['b_U'] = ('unembed.b_U', same)
  for i in range(c.layers):
    ours, theirs = f'block_{i}', f'blocks.{i}'
    for name in 'QKV':  # [H, D, K] there.
      table[f'{ours}/attn/W_{name}'] = (
        f'{theirs}.attn.W_{name}',
        lambda w: w.transpose(1, 0, 2),
      )
      table[f'{ours}/attn/b_{name}'] = (f'{theirs}.attn.b_{name}', same)
    table[f'{ours}/attn/W_O'] = (  # [H, K, D] there.
      f'{theirs}.attn.W_O',
      lambda w: w.reshape(-1, w.shape[-1]),
    )
    table[f'{ours}/attn/b_O'] = (f'{theirs}.attn.b_O', same)
    for name in ('W_in', 'b_in', 'W_out', 'b_out'):
      table[f'{ours}/mlp/{name}'] = (f'{theirs}.mlp.{name}', same)
    for n in (1, 2):
      table[f'{ours}/ln{n}/scale'] = (f'{theirs}.ln{n}.w', same)
      table[f'{ours}/ln{n}/bias'] = (f'{theirs}.ln{n}.b', same)
  return table


def rename(name: str) -> str | None:
  return name
