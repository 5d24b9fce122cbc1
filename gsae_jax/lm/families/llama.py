"""Llama: RMSNorm, rotary positions, grouped key-value heads, SwiGLU."""

import os

from gsae_jax.errors import UserError
from gsae_jax.lm.transformer import TransformerConfig

MODEL_TYPE = 'llama'


def config(raw: dict) -> TransformerConfig:
  # The class fills in what a config.json may leave out, and reads the rotary
  # settings in the spelling of every transformers version.
  # Without torch, importing it says so at length; its models are not used.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  from transformers.models.llama.configuration_llama import LlamaConfig

  c = LlamaConfig(**raw)
  rotary = c.rope_parameters
  if rotary.get('rope_type', 'default') != 'default':
    raise UserError(
      f'lm.path: rotary scaling {rotary["rope_type"]!r} is not supported; use '
      'a model whose rope_type is "default"'
    )
  for field, value, want in (
    ('hidden_act', c.hidden_act, 'silu'),
    ('attention_bias', c.attention_bias, False),
    ('mlp_bias', c.mlp_bias, False),
  ):
    if value != want:
      raise UserError(
        f'lm.path: config.json has {field}={value!r}; llama models are '
        f'supported with {want!r} only'
      )
  return TransformerConfig(
    layers=c.num_hidden_layers,
    width=c.hidden_size,
    heads=c.num_attention_heads,
    kv_heads=c.num_key_value_heads,
    head_width=c.head_dim,
    mlp_width=c.intermediate_size,
    vocabulary=c.vocab_size,
    context=c.max_position_embeddings,
    norm='rmsnorm',
    norm_eps=c.rms_norm_eps,
    rope_theta=rotary['rope_theta'],
    activation='silu',
    gated_mlp=True,
    attention_bias=False,
    mlp_bias=False,
    tied_embeddings=c.tie_word_embeddings,
  )


def weights(c: TransformerConfig) -> dict:
  transposed = lambda w: w.T  # PyTorch's Linear holds [out, in].
  heads = lambda w: w.T.reshape(c.width, -1, c.head_width)
  same = lambda w: w
  table = {
    'W_E': ('model.embed_tokens.weight', same),
    'ln_final/scale': ('model.norm.weight', same),
  }
  if not c.tied_embeddings:
    table['W_U'] = ('lm_head.weight', transposed)
  for i in range(c.layers):
    layer = f'model.layers.{i}'
    for ours, theirs, orient in (
      (f'ln1_{i}/scale', 'input_layernorm', same),
      (f'attn_{i}/W_Q', 'self_attn.q_proj', heads),
      (f'attn_{i}/W_K', 'self_attn.k_proj', heads),
      (f'attn_{i}/W_V', 'self_attn.v_proj', heads),
      (f'attn_{i}/W_O', 'self_attn.o_proj', transposed),
      (f'ln2_{i}/scale', 'post_attention_layernorm', same),
      (f'mlp_{i}/W_gate', 'mlp.gate_proj', transposed),
      (f'mlp_{i}/W_in', 'mlp.up_proj', transposed),
      (f'mlp_{i}/W_out', 'mlp.down_proj', transposed),
    ):
      table[ours] = (f'{layer}.{theirs}.weight', orient)
  return table
