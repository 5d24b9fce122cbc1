"""Model families: how a Hugging Face folder maps onto the one transformer.

A family is a module with `MODEL_TYPE`, the `model_type` of its `config.json`;
`config(raw)`, which turns that file's contents into a `TransformerConfig`; and
`weights(config)`, a table from our parameter path to the tensor's name and to
the function that brings it into our orientation.
"""

from gsae_jax.lm.families import gelu_1l, llama

FAMILIES = {family.MODEL_TYPE: family for family in (gelu_1l, llama)}
