"""Counts the operations of matrix products in a program, before it is compiled."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

# A chip adds up a product of bfloat16 in one pass. Factors of float32 are three
# such parts each, and six products of parts matter.
_PASSES = {'HIGHEST': 6, 'HIGH': 3}


class Products(NamedTuple):
  """Operations, over all devices.

  Attributes:
    flops: as products are written.
    passes: each times the passes of bfloat16 that it takes.
  """

  flops: float = 0.0
  passes: float = 0.0

  def __add__(self, other):
    return Products(*map(sum, zip(self, other, strict=True)))

  def times(self, n: float) -> 'Products':
    return Products(n * self.flops, n * self.passes)


def count(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Products:
  """The products that a function needs, loops as often as they go around."""
  traced = jax.make_jaxpr(lambda *a: fn(*a, **kwargs))(*args).jaxpr
  # Autodiff leaves products behind that nothing uses.
  used, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
  return _count(used)


def _count(jaxpr) -> Products:
  total = Products()
  # Where a program differs by platform, the last one is what a TPU takes.
  by_platform = any(e.primitive.name == 'platform_index' for e in jaxpr.eqns)
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == 'dot_general':
      total += _product(eqn)
    elif name == 'cond':
      branches = [_count(b.jaxpr) for b in params['branches']]
      total += branches[-1] if by_platform else max(branches)
    else:
      times = params['length'] if name == 'scan' else 1
      if name == 'shard_map':
        times = params['mesh'].size
      elif name == 'xla_pmap':  # Of a JAX where that is no shard_map yet.
        times = params['global_axis_size']
      for value in params.values():
        inner = getattr(value, 'jaxpr', value)
        if hasattr(inner, 'eqns'):
          total += _count(inner).times(times)
  return total


def _product(eqn) -> Products:
  a, _ = (v.aval for v in eqn.invars)
  ((contracted, _), _) = eqn.params['dimension_numbers']
  (out,) = eqn.outvars
  flops = (
    2.0
    * math.prod(out.aval.shape)
    * math.prod(a.shape[axis] for axis in contracted)
  )
  precision = eqn.params['precision']
  precision = precision[0] if isinstance(precision, tuple) else precision
  passes = 1
  if a.dtype == jnp.float32:
    passes = _PASSES.get(getattr(precision, 'name', ''), 1)
  return Products(flops, passes * flops)
