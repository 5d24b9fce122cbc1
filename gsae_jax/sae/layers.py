"""What the architectures share: initial directions, products, decoder, errors."""

import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

PRECISIONS = ('float32', 'bfloat16')
SPARSITIES = ('l1', 'decoder_norm_l1')


def unit_rows(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Random directions: Gaussian rows of norm 1 (paper 2.2 leaves it open)."""
  W_FD = jax.random.normal(key, shape)
  return W_FD / jnp.linalg.norm(W_FD, axis=-1, keepdims=True)


def match_rank(v_D: jax.Array, x_BD: jax.Array) -> jax.Array:
  """Returns `v` `[D]` as `[1, ..., D]`, with as many axes as `x` `[..., D]` has."""
  return jnp.expand_dims(v_D, range(x_BD.ndim - 1))


def product(
  a: jax.Array, b: jax.Array, precision: str, turned: bool = False
) -> jax.Array:
  """`a @ b` in float32; `b` is a matrix.

  Args:
    a: `[..., K]`, float32.
    b: `[K, N]`, float32.
    turned: `b` is `[N, K]`. Its gradient is then made as it lies, and not
      transposed.
    precision: 'float32' is true float32 on every device, where TPUs and GPUs
      take fewer bits unless they are told. 'bfloat16' rounds both factors, in
      the gradient too, and sums in float32.
  """
  if precision == 'bfloat16':
    return _bfloat16_product(turned, a, b)
  matrix = 'nk' if turned else 'kn'
  highest = jax.lax.Precision.HIGHEST
  return jnp.einsum(f'...k,{matrix}->...n', a, b, precision=highest)


def _rounded_einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  def native(a, b):
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

  def emulated(a, b):  # CPUs have no such products; the numbers are the same.
    a, b = (jax.lax.reduce_precision(v, 8, 7) for v in (a, b))
    return jnp.einsum(spec, a, b)

  return jax.lax.platform_dependent(a, b, cpu=emulated, default=native)


# Autodiff would multiply float32 cotangents with bfloat16 factors.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bfloat16_product(turned: bool, a: jax.Array, b: jax.Array) -> jax.Array:
  matrix = 'nk' if turned else 'kn'
  return _rounded_einsum(f'...k,{matrix}->...n', a, b)


def _bfloat16_product_fwd(turned, a, b):
  return _bfloat16_product(turned, a, b), (a, b)


def _bfloat16_product_bwd(turned, factors, g):
  a, b = factors
  matrix = 'nk' if turned else 'kn'
  return (
    _rounded_einsum(f'...n,{matrix}->...k', g, b),
    _rounded_einsum(f'...k,...n->{matrix}', a, g),
  )


_bfloat16_product.defvjp(_bfloat16_product_fwd, _bfloat16_product_bwd)


def centred_product(
  x_BD: jax.Array,
  b_dec_D: jax.Array,
  W: jax.Array,
  precision: str,
  turned: bool,
) -> tuple[jax.Array, jax.Array]:
  """`(x - b_dec) W`, in two parts that say who may move `b_dec`.

  `W` is `[D, F]`, or `[F, D]` if it is `turned`.

  Returns:
    `z [..., F]`, which has the value and passes no gradient to `b_dec`, and
    `shift [1, ..., F]`, which is zero: `z - shift` has the gradient.

  So the gradient costs a vector times `W`. Autodiff of the plain form would make
  `dz W^T` for every row and then sum it over the batch, one matrix product of
  eight.
  """
  frozen_D = jax.lax.stop_gradient(b_dec_D)
  centred_BD = x_BD - match_rank(frozen_D, x_BD)
  z_BF = product(centred_BD, W, precision, turned)
  # In float32 also beside bfloat16 products: it is the bias's gradient.
  frozen = jax.lax.stop_gradient(W)
  shift_F = product(b_dec_D - frozen_D, frozen, 'float32', turned)
  return z_BF, match_rank(shift_F, z_BF)


def decode(
  f_BF: jax.Array, W_dec_FD: jax.Array, b_dec_D: jax.Array, precision: str
) -> jax.Array:
  """`f W_dec + b_dec` (paper 2.1, Eq. 3)."""
  x_BD = product(f_BF, W_dec_FD, precision)
  return x_BD + match_rank(b_dec_D, x_BD)


def squared_error(x_BD: jax.Array, x_hat_BD: jax.Array) -> jax.Array:
  """`||x - x_hat||^2` of each row, `[...]`."""
  return jnp.sum((x_BD - x_hat_BD) ** 2, -1)


def weighted_l1(
  f_BF: jax.Array, W_dec_FD: jax.Array, sparsity: str, *, frozen: bool
) -> jax.Array:
  """The sparsity of each row, `[...]`.

  Args:
    f_BF: non-negative.
    W_dec_FD: the decoder.
    sparsity: 'l1', or 'decoder_norm_l1': each feature counts times the norm of
      its decoder row (Anthropic, April 2024).
    frozen: whether those norms take no gradient.
  """
  if sparsity == 'l1':
    return jnp.sum(f_BF, -1)
  norm_F = jnp.linalg.norm(W_dec_FD, axis=-1)
  if frozen:
    norm_F = jax.lax.stop_gradient(norm_F)
  return jnp.sum(f_BF * match_rank(norm_F, f_BF), -1)


class Dictionary(nn.Module):
  """What every architecture has; they say how features are found.

  Attributes:
    width: D.
    features: F.
    precision: of products, see `product`.
    turned: encoders are `[F, D]`, as they lie in training, where all of a feature
      is a row.
  """

  width: int
  features: int
  precision: str = 'float32'
  turned: bool = False

  frozen: ClassVar[tuple[str, ...]] = ()  # Parameters that are not trained.

  def encoder_of(self, W_dec_FD: jax.Array, scale: float) -> jax.Array:
    """An encoder to start with: `scale * W_dec^T`."""
    return scale * (W_dec_FD if self.turned else W_dec_FD.T)

  def centred(self, x_BD: jax.Array, W: jax.Array):
    """See `centred_product`."""
    return centred_product(x_BD, self.b_dec, W, self.precision, self.turned)

  def encode(self, x_BD: jax.Array) -> jax.Array:
    """Features, `[..., D] -> [..., F]`."""
    return self(x_BD)['f']

  def decode(self, f_BF: jax.Array) -> jax.Array:
    """Reconstructions, `[..., F] -> [..., D]`."""
    return decode(f_BF, self.W_dec, self.b_dec, self.precision)
