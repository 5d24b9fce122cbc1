"""Matrix products that are as exact as their operands, on every device."""

import contextlib

import jax
import jax.numpy as jnp


def as_precise_as(dtype: jnp.dtype) -> contextlib.AbstractContextManager:
  """Matrix products in a `with` block are float32 where `dtype` is.

  TPUs and GPUs would round the operands to fewer bits.
  """
  return jax.default_matmul_precision(
    'highest' if dtype == jnp.float32 else None
  )


def summed_in_float32(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """An einsum of two arrays of one dtype, whose result is float32."""
  if a.dtype == jnp.float32:
    return jnp.einsum(spec, a, b)

  def native(a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

  def exact(
    a, b
  ):  # XLA for CPUs lacks some of these; the numbers are the same.
    return jnp.einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32))

  return jax.lax.platform_dependent(a, b, cpu=exact, default=native)
