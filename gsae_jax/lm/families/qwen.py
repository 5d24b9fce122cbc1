"""Qwen 2 (biases of queries, keys and values) and Qwen 3 (norms of them)."""

from gsae_jax.lm.architecture import BlockConfig, TransformerConfig
from gsae_jax.lm.families import hugging_face as hf
from gsae_jax.lm.families.llama import rename as rename

MODEL_TYPES = ('qwen2', 'qwen3')
weights = hf.decoder_weights


def config(raw: dict) -> TransformerConfig:
  if raw['model_type'] == 'qwen2':
    c = hf.read_config(raw, 'qwen2', 'Qwen2Config')
    head_width = c.hidden_size // c.num_attention_heads
    fields = {'qkv_bias': True}
  else:
    c = hf.read_config(raw, 'qwen3', 'Qwen3Config')
    head_width = c.head_dim
    biased = c.attention_bias
    fields = {'qkv_bias': biased, 'out_bias': biased, 'qk_norm': True}
  rope = hf.rope_of(c, head_width)
  return hf.decoder(
    c,
    head_width=head_width,
    blocks=[BlockConfig(rope, w, head_width**-0.5) for w in hf.windows(c)],
    hidden_act=c.hidden_act,
    **fields,
  )
