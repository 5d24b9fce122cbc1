"""What an SAE costs: parameters, and operations as XLA counts them."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax.sae import VARIANTS, make_module
from gsae_jax.sae.gated import jumprelu_parameters

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


def training_flops(module) -> float:
  """Of one gradient of the loss, for each row of a batch."""

  def loss(params, x_BD):
    terms = module.apply({'params': params}, x_BD, method='terms')
    names = 'reconstruction', 'sparsity', 'auxiliary'
    return sum(jnp.mean(terms[name]) for name in names)

  x_BD = jax.ShapeDtypeStruct((_ROWS, module.width), jnp.float32)
  return _flops(jax.grad(loss), _shapes(module), x_BD) / _ROWS


def inference_flops(module) -> float:
  """Of encoding and decoding a row; of a tied Gated SAE, in JumpReLU form."""
  x_BD = jax.ShapeDtypeStruct((_ROWS, module.width), jnp.float32)
  shapes = _shapes(module)

  def plain(params, x_BD):
    return module.apply({'params': params}, x_BD)['x_hat']

  def jumprelu(encoder, decoder, x_BD):
    W_DF, b_F, theta_F = encoder
    p_BF = x_BD @ W_DF + b_F
    f_BF = jnp.where(p_BF > theta_F, jax.nn.relu(p_BF), 0)
    return f_BF @ decoder['W_dec'] + decoder['b_dec']

  if 'r_mag' not in shapes or 'W_gate' not in shapes:
    return _flops(plain, shapes, x_BD) / _ROWS
  # Once for all rows, and so not counted.
  encoder = jax.eval_shape(jumprelu_parameters, shapes)
  return _flops(jumprelu, encoder, shapes, x_BD) / _ROWS
