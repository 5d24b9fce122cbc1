"""What the architectures share: initial directions, encoder product, decoder."""

import jax
import jax.numpy as jnp


def unit_rows(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Random directions: Gaussian rows of norm 1 (paper 2.2 leaves it open)."""
  W_FD = jax.random.normal(key, shape)
  return W_FD / jnp.linalg.norm(W_FD, axis=-1, keepdims=True)


@jax.custom_vjp
def centred_product(
  x_BD: jax.Array, b_dec_D: jax.Array, W_DF: jax.Array
) -> jax.Array:
  """`(x - b_dec) W`, whose gradient for `b_dec` costs no matrix product.

  Autodiff would make `dz W^T` for every row and then sum it over the batch, one
  matrix product of eight; here the batch is summed first. The cotangent of `x`
  is that product, which jit prunes where nobody asks for it, as in training.
  """
  return (x_BD - b_dec_D) @ W_DF


def _centred_product_fwd(x_BD, b_dec_D, W_DF):
  centred_BD = x_BD - b_dec_D
  return centred_BD @ W_DF, (centred_BD, W_DF)


def _centred_product_bwd(residuals, dz_BF):
  centred_BD, W_DF = residuals
  rows = tuple(range(dz_BF.ndim - 1))  # One axis, or those of a context batch.
  db_dec_D = -(W_DF @ dz_BF.sum(rows))
  dW_DF = jnp.tensordot(centred_BD, dz_BF, (rows, rows))
  return dz_BF @ W_DF.T, db_dec_D, dW_DF


centred_product.defvjp(_centred_product_fwd, _centred_product_bwd)


def decode(
  f_BF: jax.Array, W_dec_FD: jax.Array, b_dec_D: jax.Array
) -> jax.Array:
  """`f W_dec + b_dec` (paper 2.1, Eq. 3)."""
  return f_BF @ W_dec_FD + b_dec_D


def squared_error(x_BD: jax.Array, x_hat_BD: jax.Array) -> jax.Array:
  """`||x - x_hat||^2`, a sum over the width, then the mean over the batch."""
  return jnp.mean(jnp.sum((x_BD - x_hat_BD) ** 2, -1))
