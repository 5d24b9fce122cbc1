"""What the families of the transformers library have in common."""

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gsae_jax.errors import UserError
from gsae_jax.lm.architecture import BlockConfig, TransformerConfig
from gsae_jax.lm.rotary import Rope, make_rope

Table = dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]]

_ACTIVATIONS = {
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'silu': 'silu',
  'swish': 'silu',
  'relu': 'relu',
}


def read_config(raw: dict[str, Any], module: str, name: str) -> Any:
  """A config.json through its class in transformers.

  The class fills in what the file leaves out, and reads the spellings of every
  version.

  Args:
    raw: the file's contents.
    module: of `transformers.models`, where the class is.
    name: the class.

  Raises:
    UserError: the class refuses a value.
  """
  # Without torch, importing it says so at length; its models are not used.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  place = f'transformers.models.{module}.configuration_{module}'
  make = getattr(importlib.import_module(place), name)
  try:
    return make(**raw)
  except Exception as e:  # Of many kinds, from checks of three libraries.
    reason = ' '.join(str(e).split())
    raise UserError(f'lm.path: config.json: {reason}') from e


def activation(name: str) -> str:
  """Our name of a non-linearity.

  Raises:
    UserError: there is none.
  """
  if name not in _ACTIVATIONS:
    raise UserError(
      f'lm.path: config.json asks for the activation {name!r}; supported are '
      f'{", ".join(_ACTIVATIONS)}'
    )
  return _ACTIVATIONS[name]


def refuse(**settings: tuple[Any, Any]) -> None:
  """Raises UserError where a setting is not what the model is built for.

  Args:
    **settings: by name, what config.json has, and what is supported.
  """
  for name, (value, want) in settings.items():
    if value != want:
      raise UserError(
        f'lm.path: config.json has {name}={value!r}; supported is {want!r}'
      )


def rope_of(c: Any, head_width: int, kind: str | None = None) -> Rope:
  """The rotary positions of a config, of one kind of layer if there are two."""
  settings: Mapping[str, Any] = c.rope_parameters
  if kind is not None and kind in settings:
    settings = settings[kind]
  return make_rope(settings, head_width, c.max_position_embeddings)


def windows(c: Any) -> list[int | None]:
  """Each layer's window, by the config's `layer_types`.

  Raises:
    UserError: a layer is of a kind that is not known.
  """
  unknown = set(c.layer_types) - {'sliding_attention', 'full_attention'}
  if unknown:
    raise UserError(
      f'lm.path: config.json has a layer of {sorted(unknown)[0]!r}; supported are '
      "'full_attention' and 'sliding_attention'"
    )
  return [
    c.sliding_window if kind == 'sliding_attention' else None
    for kind in c.layer_types
  ]


def decoder(
  c: Any,
  *,
  head_width: int,
  blocks: list[BlockConfig],
  hidden_act: str,
  **fields: Any,
) -> TransformerConfig:
  """A config in Llama's field names; `fields` is what a family adds."""
  return TransformerConfig(
    **{
      'blocks': tuple(blocks),
      'width': c.hidden_size,
      'heads': c.num_attention_heads,
      'kv_heads': c.num_key_value_heads,
      'head_width': head_width,
      'mlp_width': c.intermediate_size,
      'vocabulary': c.vocab_size,
      'context': c.max_position_embeddings,
      'norm': 'rmsnorm',
      'norm_eps': c.rms_norm_eps,
      'activation': activation(hidden_act),
      'gated_mlp': True,
      'tied_embeddings': c.tie_word_embeddings,
    }
    | fields
  )


def decoder_weights(c: TransformerConfig) -> Table:
  """The tensors of a model in Llama's names, as the config calls for them."""
  transposed = lambda w: w.T  # PyTorch's Linear holds [out, in].
  heads = lambda w: w.T.reshape(c.width, -1, c.head_width)
  head_bias = lambda w: w.reshape(-1, c.head_width)
  table: Table = {
    'W_E': ('model.embed_tokens.weight', same),
    'ln_final/scale': ('model.norm.weight', same),
  }
  if not c.tied_embeddings:
    table['W_U'] = ('lm_head.weight', transposed)
  norms = {'ln1': 'input_layernorm', 'ln2': 'post_attention_layernorm'}
  if c.post_norms:
    norms = {
      'ln1': 'input_layernorm',
      'ln1_post': 'post_attention_layernorm',
      'ln2': 'pre_feedforward_layernorm',
      'ln2_post': 'post_feedforward_layernorm',
    }
  if c.qk_norm:
    norms |= {f'attn/{n}_norm': f'self_attn.{n}_norm' for n in 'qk'}
  matrices = {
    'attn/W_Q': ('self_attn.q_proj', heads, c.qkv_bias),
    'attn/W_K': ('self_attn.k_proj', heads, c.qkv_bias),
    'attn/W_V': ('self_attn.v_proj', heads, c.qkv_bias),
    'attn/W_O': ('self_attn.o_proj', transposed, c.out_bias),
    'mlp/W_gate': ('mlp.gate_proj', transposed, c.mlp_bias),
    'mlp/W_in': ('mlp.up_proj', transposed, c.mlp_bias),
    'mlp/W_out': ('mlp.down_proj', transposed, c.mlp_bias),
  }
  for i in range(c.layers):
    theirs = f'model.layers.{i}'
    for ours, name in norms.items():
      table[f'block_{i}/{ours}/scale'] = (f'{theirs}.{name}.weight', same)
    for ours, (name, orient, biased) in matrices.items():
      table[f'block_{i}/{ours}'] = (f'{theirs}.{name}.weight', orient)
      if biased:
        table[f'block_{i}/{ours.replace("W_", "b_")}'] = (
          f'{theirs}.{name}.bias',
          head_bias if orient is heads else same,
        )
  return table


def same(w: np.ndarray) -> np.ndarray:
  return w
