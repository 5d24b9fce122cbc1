"""Small random models of every family, as transformers' PyTorch has them."""

import numpy as np
import torch
import transformers

from tests.support.golden import make_tensors, write_tokenizer

# Products are small: a second thread would only wait.
torch.set_num_threads(1)

LENGTH, VOCABULARY, LAYERS = 40, 96, 3

_LLAMA = {
  'vocab_size': VOCABULARY,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': LAYERS,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'rope_theta': 500.0,
  'bos_token_id': 0,
  'eos_token_id': 1,
}
_GEMMA = _LLAMA | {'head_dim': 16}
_NEOX = {
  k: v
  for k, v in _LLAMA.items()
  if k not in ('num_key_value_heads', 'rope_theta')
}
_GPT2 = {
  'vocab_size': VOCABULARY,
  'n_embd': 32,
  'n_layer': LAYERS,
  'n_head': 4,
  'n_positions': 64,
  'bos_token_id': 0,
  'eos_token_id': 1,
}
_SLIDING_THIRD = ['full_attention', 'full_attention', 'sliding_attention']


def _scaled(kind, **settings):
  return {
    'rope_parameters': {'rope_type': kind, 'rope_theta': 500.0, **settings}
  }


# Name: the class of the config, and what differs from its defaults.
CASES = {
  'gpt2': ('GPT2', _GPT2),
  'gpt2_flags': (
    'GPT2',
    _GPT2
    | {
      'n_inner': 56,
      'activation_function': 'relu',
      'scale_attn_by_inverse_layer_idx': True,
      'tie_word_embeddings': False,
    },
  ),
  'gpt2_unscaled': (
    'GPT2',
    _GPT2 | {'scale_attn_weights': False, 'activation_function': 'gelu'},
  ),
  'neox': ('GPTNeoX', _NEOX | {'rotary_pct': 0.25}),
  'neox_flags': (
    'GPTNeoX',
    _NEOX
    | {
      'rotary_pct': 1.0,
      'rotary_emb_base': 300,
      'use_parallel_residual': False,
      'attention_bias': False,
      'tie_word_embeddings': True,
      'hidden_act': 'gelu_new',
    },
  ),
  'llama': ('Llama', _LLAMA),
  'llama_flags': (
    'Llama',
    _LLAMA
    | {
      'num_key_value_heads': 1,
      'head_dim': 12,
      'attention_bias': True,
      'mlp_bias': True,
      'tie_word_embeddings': True,
      'hidden_act': 'gelu',
    },
  ),
  'llama_linear': ('Llama', _LLAMA | _scaled('linear', factor=4.0)),
  'llama_dynamic': ('Llama', _LLAMA | _scaled('dynamic', factor=4.0)),
  'llama3': (
    'Llama',
    _LLAMA
    | _scaled(
      'llama3',
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=32,
    ),
  ),
  'llama_yarn': (
    'Llama',
    _LLAMA | _scaled('yarn', factor=4.0, original_max_position_embeddings=16),
  ),
  'mistral': ('Mistral', _LLAMA | {'sliding_window': 7}),
  'mistral_full': (
    'Mistral',
    _LLAMA | {'sliding_window': None, 'head_dim': 12},
  ),
  'qwen2': ('Qwen2', _LLAMA | {'tie_word_embeddings': True}),
  'qwen2_window': (
    'Qwen2',
    _LLAMA
    | {'use_sliding_window': True, 'sliding_window': 9, 'max_window_layers': 1},
  ),
  'qwen3': ('Qwen3', _LLAMA | {'head_dim': 16}),
  'qwen3_flags': (
    'Qwen3',
    _LLAMA
    | {
      'head_dim': 12,
      'attention_bias': True,
      'use_sliding_window': True,
      'sliding_window': 9,
      'layer_types': _SLIDING_THIRD,
      'tie_word_embeddings': True,
    },
  ),
  'gemma': ('Gemma', _GEMMA),
  'gemma_flags': (
    'Gemma',
    _GEMMA
    | {
      'num_key_value_heads': 4,
      'attention_bias': True,
      'tie_word_embeddings': False,
    },
  ),
  'gemma2': (
    'Gemma2',
    _GEMMA
    | {
      'sliding_window': 7,
      'query_pre_attn_scalar': 20,
      'attn_logit_softcapping': 2.0,
      'final_logit_softcapping': 3.0,
    },
  ),
  'gemma2_uncapped': (
    'Gemma2',
    _GEMMA
    | {
      'sliding_window': 64,
      'attn_logit_softcapping': None,
      'final_logit_softcapping': None,
      'layer_types': _SLIDING_THIRD,
    },
  ),
  'gemma3': (
    'Gemma3Text',
    _GEMMA
    | {'sliding_window': 7, 'sliding_window_pattern': 2, 'rope_theta': 9000.0},
  ),
  'gemma3_scaled': (
    'Gemma3Text',
    _GEMMA
    | {
      'sliding_window': 7,
      'layer_types': _SLIDING_THIRD,
      'final_logit_softcapping': 3.0,
      'rope_parameters': {
        'full_attention': {
          'rope_type': 'linear',
          'factor': 8.0,
          'rope_theta': 9000.0,
        },
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0},
      },
    },
  ),
}


def make(name):
  """A model of random weights large enough that every flag shows."""
  family, settings = CASES[name]
  config = getattr(transformers, f'{family}Config')(**settings)
  model = transformers.AutoModelForCausalLM.from_config(
    config,
    attn_implementation='eager',  # The one that knows soft caps.
  ).eval()
  parameters = dict(model.named_parameters())
  shapes = {k: tuple(p.shape) for k, p in parameters.items()}
  with torch.no_grad():
    for k, value in make_tensors(shapes, config.model_type).items():
      parameters[k].copy_(torch.from_numpy(value))
  return model


def save(model, folder):
  """As transformers saves it, with a tokenizer of as many words."""
  model.save_pretrained(folder)
  write_tokenizer(folder, VOCABULARY)


def modules(model):
  """For every layer, the modules at our four sites.

  Yields attention's output matrix, the MLP's, what the MLP adds to the residual
  stream, and the layer.
  """
  body = model.base_model
  for layer in getattr(body, 'layers', None) or body.h:
    attention = getattr(layer, 'self_attn', None)
    if attention is None:
      attention = getattr(layer, 'attention', None) or layer.attn
    find = lambda module, names: next(
      getattr(module, n) for n in names if hasattr(module, n)
    )
    yield (
      find(attention, ('o_proj', 'dense', 'c_proj')),
      find(layer.mlp, ('down_proj', 'dense_4h_to_h', 'c_proj')),
      getattr(layer, 'post_feedforward_layernorm', layer.mlp),
      layer,
    )


def first(output):
  return output[0] if isinstance(output, tuple) else output


def run(model, ids, zeroed=None):
  """Logits, and the activation at every site; one site may be set to zero."""
  taken, hooks = {}, []

  def note(site, value):
    if site == zeroed:
      value = torch.zeros_like(value)
    taken[site] = value.detach().float().numpy().copy()
    return value

  def entering(site):
    return lambda module, inputs: (note(site, inputs[0]),)

  def leaving(site):
    def hook(module, inputs, output):
      value = note(site, first(output))
      return (value, *output[1:]) if isinstance(output, tuple) else value

    return hook

  for i, (out, down, added, layer) in enumerate(modules(model)):
    hooks += [
      out.register_forward_pre_hook(entering(f'attn_pre_linear.{i}')),
      down.register_forward_pre_hook(entering(f'mlp_hidden.{i}')),
      added.register_forward_hook(leaving(f'mlp_out.{i}')),
      layer.register_forward_hook(leaving(f'resid_post.{i}')),
    ]
  try:
    with torch.no_grad():
      logits = model(torch.from_numpy(ids).long(), use_cache=False).logits
  finally:
    for hook in hooks:
      hook.remove()
  return logits.float().numpy(), taken


def random_ids(batch=2, length=LENGTH):
  rng = np.random.default_rng(0)
  return rng.integers(0, VOCABULARY, (batch, length)).astype(np.int32)
