"""GELU-1L and its like, in TransformerLens's names: pre-LayerNorm, exact GELU,
learned positions, untied unembedding (Nanda 2022). The embedded model is one.
"""

from gsae_jax.lm.transformer import TransformerConfig

MODEL_TYPE = 'gelu_1l'


def config(raw: dict) -> TransformerConfig:
  return TransformerConfig(
    layers=raw['n_layers'],
    width=raw['d_model'],
    heads=raw['n_heads'],
    kv_heads=raw['n_heads'],
    head_width=raw['d_head'],
    mlp_width=raw['d_mlp'],
    vocabulary=raw['d_vocab'],
    context=raw['n_ctx'],
    norm='layernorm',
    norm_eps=raw['eps'],
    rope_theta=None,
    activation='gelu',
    gated_mlp=False,
    attention_bias=True,
    mlp_bias=True,
    tied_embeddings=False,
  )


def weights(c: TransformerConfig) -> dict:
  same = lambda w: w
  table = {
    'W_E': ('embed.W_E', same),
    'W_pos': ('pos_embed.W_pos', same),
    'ln_final/scale': ('ln_final.w', same),
    'ln_final/bias': ('ln_final.b', same),
    'W_U': ('unembed.W_U', same),
  }
  for i in range(c.layers):
    for name in 'QKV':  # [H, D, K] there.
      table[f'attn_{i}/W_{name}'] = (
        f'blocks.{i}.attn.W_{name}',
        lambda w: w.transpose(1, 0, 2),
      )
      table[f'attn_{i}/b_{name}'] = (f'blocks.{i}.attn.b_{name}', same)
    table[f'attn_{i}/W_O'] = (  # [H, K, D] there.
      f'blocks.{i}.attn.W_O',
      lambda w: w.reshape(-1, w.shape[-1]),
    )
    table[f'attn_{i}/b_O'] = (f'blocks.{i}.attn.b_O', same)
    for ours in ('W_in', 'b_in', 'W_out', 'b_out'):
      table[f'mlp_{i}/{ours}'] = (f'blocks.{i}.mlp.{ours}', same)
    for n in (1, 2):
      table[f'ln{n}_{i}/scale'] = (f'blocks.{i}.ln{n}.w', same)
      table[f'ln{n}_{i}/bias'] = (f'blocks.{i}.ln{n}.b', same)
  return table
