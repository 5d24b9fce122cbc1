"""GPT-2: LayerNorm, learned positions, one matrix for queries, keys, values."""

from gsae_jax.lm.architecture import BlockConfig, TransformerConfig
from gsae_jax.lm.families import hugging_face as hf

MODEL_TYPES = ('gpt2',)


def config(raw: dict) -> TransformerConfig:
  c = hf.read_config(raw, 'gpt2', 'GPT2Config')
  hf.refuse(add_cross_attention=(c.add_cross_attention, False))
  head_width = c.n_embd // c.n_head
  scale = head_width**-0.5 if c.scale_attn_weights else 1.0
  by_layer = c.scale_attn_by_inverse_layer_idx
  return TransformerConfig(
    blocks=tuple(
      BlockConfig(None, None, scale / (i + 1) if by_layer else scale)
      for i in range(c.n_layer)
    ),
    width=c.n_embd,
    heads=c.n_head,
    kv_heads=c.n_head,
    head_width=head_width,
    mlp_width=c.n_inner or 4 * c.n_embd,
    vocabulary=c.vocab_size,
    context=c.n_positions,
    norm='layernorm',
    norm_eps=c.layer_norm_epsilon,
    activation=hf.activation(c.activation_function),
    gated_mlp=False,
    tied_embeddings=c.tie_word_embeddings,
    learned_positions=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
  )


def weights(c: TransformerConfig) -> hf.Table:
  table: hf.Table = {
    'W_E': ('transformer.wte.weight', hf.same),
    'W_pos': ('transformer.wpe.weight', hf.same),
    'ln_final/scale': ('transformer.ln_f.weight', hf.same),
    'ln_final/bias': ('transformer.ln_f.bias', hf.same),
  }
  if not c.tied_embeddings:
    table['W_U'] = ('lm_head.weight', lambda w: w.T)
  # Side by side, as [in, out].
  matrix = lambda j: lambda w: w.reshape(-1, 3, c.heads, c.head_width)[:, j]
  bias = lambda j: lambda w: w.reshape(3, c.heads, c.head_width)[j]
  for i in range(c.layers):
    ours, theirs = f'block_{i}', f'transformer.h.{i}'
    for n in (1, 2):
      table[f'{ours}/ln{n}/scale'] = (f'{theirs}.ln_{n}.weight', hf.same)
      table[f'{ours}/ln{n}/bias'] = (f'{theirs}.ln_{n}.bias', hf.same)
    fused = f'{theirs}.attn.c_attn'
    for j, name in enumerate('QKV'):
      table[f'{ours}/attn/W_{name}'] = (f'{fused}.weight', matrix(j))
      table[f'{ours}/attn/b_{name}'] = (f'{fused}.bias', bias(j))
    for letter, name, layer in (
      ('O', 'attn', 'attn.c_proj'),
      ('in', 'mlp', 'mlp.c_fc'),
      ('out', 'mlp', 'mlp.c_proj'),
    ):
      for kind, suffix in (('W', 'weight'), ('b', 'bias')):
        table[f'{ours}/{name}/{kind}_{letter}'] = (
          f'{theirs}.{layer}.{suffix}',
          hf.same,
        )
  return table


def rename(name: str) -> str | None:
  if name.endswith(('.attn.bias', '.attn.masked_bias')):  # The causal mask.
    return None
  # The published files are of the model without its head.
  known = name.startswith(('transformer.', 'lm_head.'))
  return name if known else f'transformer.{name}'
