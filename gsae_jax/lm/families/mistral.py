"""Mistral: Llama with attention in a sliding window."""

from gsae_jax.lm.architecture import BlockConfig, TransformerConfig
from gsae_jax.lm.families import hugging_face as hf
from gsae_jax.lm.families.llama import rename as rename

MODEL_TYPES = ('mistral',)
weights = hf.decoder_weights


def config(raw: dict) -> TransformerConfig:
  c = hf.read_config(raw, 'mistral', 'MistralConfig')
  block = BlockConfig(
    hf.rope_of(c, c.head_dim), c.sliding_window, c.head_dim**-0.5
  )
  return hf.decoder(
    c,
    head_width=c.head_dim,
    blocks=[block] * c.num_hidden_layers,
    hidden_act=c.hidden_act,
  )
