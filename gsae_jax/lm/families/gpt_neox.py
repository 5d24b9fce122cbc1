"""GPT-NeoX (Pythia): attention and MLP in parallel, a part of a head rotates."""

from gsae_jax.lm.architecture import BlockConfig, TransformerConfig
from gsae_jax.lm.families import hugging_face as hf

MODEL_TYPES = ('gpt_neox',)


def config(raw: dict) -> TransformerConfig:
  c = hf.read_config(raw, 'gpt_neox', 'GPTNeoXConfig')
  head_width = c.hidden_size // c.num_attention_heads
  block = BlockConfig(hf.rope_of(c, head_width), None, head_width**-0.5)
  return TransformerConfig(
    blocks=(block,) * c.num_hidden_layers,
    width=c.hidden_size,
    heads=c.num_attention_heads,
    kv_heads=c.num_attention_heads,
    head_width=head_width,
    mlp_width=c.intermediate_size,
    vocabulary=c.vocab_size,
    context=c.max_position_embeddings,
    norm='layernorm',
    norm_eps=c.layer_norm_eps,
    activation=hf.activation(c.hidden_act),
    gated_mlp=False,
    tied_embeddings=c.tie_word_embeddings,
    qkv_bias=c.attention_bias,
    out_bias=c.attention_bias,
    mlp_bias=True,
    parallel=c.use_parallel_residual,
  )


def weights(c: TransformerConfig) -> hf.Table:
  transposed = lambda w: w.T
  # Each head holds its three.
  heads = lambda w, *rest: w.reshape(c.heads, 3, c.head_width, *rest)
  matrix = lambda j: lambda w: heads(w, -1)[:, j].transpose(2, 0, 1)
  bias = lambda j: lambda w: heads(w)[:, j]
  table: hf.Table = {
    'W_E': ('gpt_neox.embed_in.weight', hf.same),
    'ln_final/scale': ('gpt_neox.final_layer_norm.weight', hf.same),
    'ln_final/bias': ('gpt_neox.final_layer_norm.bias', hf.same),
  }
  if not c.tied_embeddings:
    table['W_U'] = ('lm_head.weight', transposed)
  for i in range(c.layers):
    ours, theirs = f'block_{i}', f'gpt_neox.layers.{i}'
    for n, name in ((1, 'input_layernorm'), (2, 'post_attention_layernorm')):
      table[f'{ours}/ln{n}/scale'] = (f'{theirs}.{name}.weight', hf.same)
      table[f'{ours}/ln{n}/bias'] = (f'{theirs}.{name}.bias', hf.same)
    fused = f'{theirs}.attention.query_key_value'
    for j, name in enumerate('QKV'):
      table[f'{ours}/attn/W_{name}'] = (f'{fused}.weight', matrix(j))
      if c.qkv_bias:
        table[f'{ours}/attn/b_{name}'] = (f'{fused}.bias', bias(j))
    for path, layer, biased in (
      ('attn/W_O', 'attention.dense', c.out_bias),
      ('mlp/W_in', 'mlp.dense_h_to_4h', True),
      ('mlp/W_out', 'mlp.dense_4h_to_h', True),
    ):
      table[f'{ours}/{path}'] = (f'{theirs}.{layer}.weight', transposed)
      if biased:
        table[f'{ours}/{path.replace("W_", "b_")}'] = (
          f'{theirs}.{layer}.bias',
          hf.same,
        )
  return table


def rename(name: str) -> str | None:
  # Buffers of older checkpoints: the causal mask, the rotary frequencies.
  if name.endswith(
    ('.attention.bias', '.attention.masked_bias', '.rotary_emb.inv_freq')
  ):
    return None
  return 'lm_head.weight' if name == 'embed_out.weight' else name
