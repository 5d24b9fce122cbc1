"""Gemma 1, 2 and 3 (text): scaled embeddings, norms of 1 + w, GeGLU.

Gemma 2 adds norms behind attention and MLP, soft caps and windows in every other
layer; Gemma 3 norms of queries and keys, and rotary positions by kind of layer.
"""

from gsae_jax.lm.architecture import BlockConfig, TransformerConfig
from gsae_jax.lm.families import hugging_face as hf

MODEL_TYPES = ('gemma', 'gemma2', 'gemma3_text', 'gemma3')
weights = hf.decoder_weights

_PICTURES = ('vision_tower.', 'multi_modal_projector.')


def config(raw: dict) -> TransformerConfig:
  kind = raw['model_type']
  if kind == 'gemma3':  # With pictures; its text model is one of its parts.
    return config(raw['text_config'] | {'model_type': 'gemma3_text'})
  module, name = {
    'gemma': ('gemma', 'GemmaConfig'),
    'gemma2': ('gemma2', 'Gemma2Config'),
    'gemma3_text': ('gemma3', 'Gemma3TextConfig'),
  }[kind]
  c = hf.read_config(raw, module, name)
  hf.refuse(
    use_bidirectional_attention=(bool(c.use_bidirectional_attention), False)
  )
  fields = {
    'norm': 'rmsnorm_offset',
    'embedding_scale': c.hidden_size**0.5,
    'qkv_bias': c.attention_bias,
    'out_bias': c.attention_bias,
  }
  if kind == 'gemma':
    block = BlockConfig(hf.rope_of(c, c.head_dim), None, c.head_dim**-0.5)
    blocks = [block] * c.num_hidden_layers
    # The published files say "gelu" and mean the approximation; a file may name
    # it in a field of its own.
    act = raw.get('hidden_activation') or raw.get('hidden_act') or 'gelu'
    act = 'gelu_pytorch_tanh' if act == 'gelu' else act
  else:
    scale = c.query_pre_attn_scalar**-0.5
    blocks = [
      BlockConfig(hf.rope_of(c, c.head_dim, layer), window, scale)
      for layer, window in zip(c.layer_types, hf.windows(c), strict=True)
    ]
    act = c.hidden_activation
    fields |= {'post_norms': True, 'logit_cap': c.final_logit_softcapping}
    if kind == 'gemma2':
      fields['attention_cap'] = c.attn_logit_softcapping
    else:
      hf.refuse(attn_logit_softcapping=(c.attn_logit_softcapping, None))
      fields['qk_norm'] = True
  return hf.decoder(
    c, head_width=c.head_dim, blocks=blocks, hidden_act=act, **fields
  )


def rename(name: str) -> str | None:
  for pictured, plain in (
    ('model.language_model.', 'model.'),
    ('language_model.model.', 'model.'),
    ('language_model.lm_head.', 'lm_head.'),
  ):
    if name.startswith(pictured):
      return plain + name.removeprefix(pictured)
  if name.removeprefix('model.').startswith(_PICTURES):
    return None
  return name
