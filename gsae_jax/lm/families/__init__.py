"""Model families: how a Hugging Face folder maps onto the one transformer.

A family is a module with

  MODEL_TYPES    the values of `model_type` in config.json that it reads;
  config(raw)    that file's contents as a `TransformerConfig`;
  weights(config)  from our parameter's path to the tensor's name and to the
                 function, of NumPy views only, that turns it our way;
  rename(name)   a file's name of a tensor as `weights` has it, or None for what
                 is no parameter.
"""

from gsae_jax.lm.families import (
  gelu_1l,
  gemma,
  gpt2,
  gpt_neox,
  llama,
  mistral,
  qwen,
)

FAMILIES = {
  model_type: family
  for family in (gelu_1l, gemma, gpt2, gpt_neox, llama, mistral, qwen)
  for model_type in family.MODEL_TYPES
}
