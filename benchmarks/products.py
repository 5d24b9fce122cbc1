"""What a machine's matrix products can do at most, at the sizes of a benchmark."""

import json
import sys

from benchmarks import turns

PRODUCTS = 'matmul'  # The name of the side.


def command(
  rows: int,
  width: int,
  features: int,
  *,
  device: str,
  times: int,
  gradient: bool,
) -> list[str]:
  """What runs the side; the arguments are those of `make`."""
  told = json.dumps(
    {
      'rows': rows,
      'width': width,
      'features': features,
      'device': device,
      'times': times,
      'gradient': gradient,
    }
  )
  return [sys.executable, '-m', 'benchmarks.products', told]


def make(
  *,
  rows: int,
  width: int,
  features: int,
  device: str,
  times: int,
  gradient: bool,
) -> turns.Side:
  """Products of an encoder and a decoder, alone, by JAX.

  Args:
    rows: B.
    width: D.
    features: F.
    device: 'cpu', in float32, or 'gpu', in bfloat16.
    times: how often in a turn.
    gradient: whether the product of a weight's gradient is one of them.
  """
  import jax
  import jax.numpy as jnp

  dtype = jnp.float32 if device == 'cpu' else jnp.bfloat16
  best = jax.lax.Precision.HIGHEST if device == 'cpu' else None
  product = lambda spec: jax.jit(
    lambda a, b: jnp.einsum(
      spec, a, b, precision=best, preferred_element_type=dtype
    )
  )
  encode, decode, contract = map(
    product, ('bd,df->bf', 'bf,fd->bd', 'bd,bf->df')
  )
  draw = lambda seed, shape: jax.random.normal(
    jax.random.key(seed), shape, dtype
  )
  x_BD = draw(0, (rows, width))
  W_DF, W_FD = draw(1, (width, features)), draw(2, (features, width))

  def run():
    for _ in range(times):
      f_BF = encode(x_BD, W_DF)
      out = decode(f_BF, W_FD), contract(x_BD, f_BF) if gradient else None
    jax.block_until_ready(out)

  run()
  flops = (3 if gradient else 2) * 2.0 * rows * width * features
  return turns.Side(run, {'flops': flops})


if __name__ == '__main__':
  turns.serve(lambda: make(**json.loads(sys.argv[1])))
