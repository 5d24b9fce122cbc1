"""Llama 1 to 3: RMSNorm, rotary positions, grouped key-value heads, SwiGLU."""

from gsae_jax.lm.architecture import BlockConfig, TransformerConfig
from gsae_jax.lm.families import hugging_face as hf

MODEL_TYPES = ('llama',)
weights = hf.decoder_weights


def config(raw: dict) -> TransformerConfig:
  c = hf.read_config(raw, 'llama', 'LlamaConfig')
  block = BlockConfig(hf.rope_of(c, c.head_dim), None, c.head_dim**-0.5)
  return hf.decoder(
    c,
    head_width=c.head_dim,
    blocks=[block] * c.num_hidden_layers,
    hidden_act=c.hidden_act,
    qkv_bias=c.attention_bias,
    out_bias=c.attention_bias,
    mlp_bias=c.mlp_bias,
  )


def rename(name: str) -> str | None:
  # A buffer that older checkpoints carry and that is a function of the config.
  return None if name.endswith('rotary_emb.inv_freq') else name
