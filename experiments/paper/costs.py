"""What an SAE costs: parameters, and operations as XLA counts them."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax.sae import VARIANTS, make_module

# Rows of the batch that is counted: products are all that matters.
_ROWS = 1024


def module_of(architecture: str, width: int, features: int, **changes: Any):
  about = {'architecture': architecture, 'width': width, 'features': features}
  return make_module(VARIANTS | about | changes)


def _shapes(module) -> dict[str, jax.ShapeDtypeStruct]:
  x_BD = jnp.zeros((1, module.width))
  return jax.eval_shape(module.init, jax.random.key(0), x_BD)['params']


def parameters(module) -> int:
  """How many numbers an SAE has."""
  return sum(math.prod(v.shape) for v in _shapes(module).values())


def _flops(fn, *args) -> float:
  return jax.jit(fn).lower(*args).compile().cost_analysis()['flops']


@functools.cache
def training_flops(module) -> float:
  """Of one gradient of the loss, for each row of a batch."""

  def loss(params, x_BD):
    terms = module.apply({'params': params}, x_BD, method='terms')
    names = 'reconstruction', 'sparsity', 'auxiliary'
    return sum(jnp.mean(terms[name]) for name in names)

  x_BD = jax.ShapeDtypeStruct((_ROWS, module.width), jnp.float32)
  return _flops(jax.grad(loss), _shapes(module), x_BD) / _ROWS


@functools.cache
def inference_flops(module) -> float:
  """Of encoding and decoding a row, as the module does it."""

  def reconstruct(params, x_BD):
    return module.apply({'params': params}, x_BD)['x_hat']

  x_BD = jax.ShapeDtypeStruct((_ROWS, module.width), jnp.float32)
  return _flops(reconstruct, _shapes(module), x_BD) / _ROWS
