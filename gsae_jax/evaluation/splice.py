"""Runs the language model with and without SAEs, over all devices.

The clean pass leaves its log-probabilities and activations on the devices, and
each spliced pass starts from them. Only rows in the mask are replaced, by the
reconstruction or by zeros alike, and predictions are counted that are made
from such rows: special tokens keep their activations.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import jax_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.evaluation.metrics import Accumulator
from gsae_jax.lm.text import Contexts
from gsae_jax.lm.weights import LanguageModel
from gsae_jax.mesh import make_mesh

AXIS = 'data'


def clean_pass(
  module: nn.Module, sites: tuple[str, ...], lm_params, ids_BL, m_BL
):
  """Sums, log-probabilities `[B, L, V]` and activations by site, unchanged."""
  logits_BLV, x = module.apply({'params': lm_params}, ids_BL, sites=sites)
  log_p_BLV = jax.nn.log_softmax(logits_BLV)
  sums = {
    'ce': cross_entropy(log_p_BLV, ids_BL, m_BL),
    'predictions': jnp.sum(m_BL[:, :-1], dtype=jnp.float32),
  }
  return jax.lax.psum(sums, AXIS), log_p_BLV, x


def cross_entropy(log_p_BLV, ids_BL, m_BL) -> jax.Array:
  """Sum in nats over the predictions made from rows in the mask."""
  log_p_BL = jnp.take_along_axis(log_p_BLV[:, :-1], ids_BL[:, 1:, None], -1)
  return -jnp.sum(jnp.where(m_BL[:, :-1], log_p_BL[..., 0], 0.0))


def ablated_pass(module: nn.Module, site: str, lm_params, ids_BL, m_BL):
  """Sums with the site's rows set to zero (paper 2.3)."""
  zero = lambda x_BLD: jnp.where(m_BL[..., None], 0, x_BLD)
  logits_BLV, _ = module.apply(
    {'params': lm_params}, ids_BL, edits={site: zero}
  )
  log_p_BLV = jax.nn.log_softmax(logits_BLV)
  return jax.lax.psum({'ce': cross_entropy(log_p_BLV, ids_BL, m_BL)}, AXIS)


def spliced_pass(
  module: nn.Module,
  sae: nn.Module,
  site: str,
  lm_params,
  ids_BL,
  m_BL,
  log_p_BLV,
  x_BLD,
  sae_params,
):
  """Sums with one SAE's reconstruction in place of the site's rows."""
  x_BLD = x_BLD.astype(jnp.float32)
  out = sae.apply({'params': sae_params}, x_BLD)
  f_BLF, x_hat_BLD = out['f'], out['x_hat']

  def splice(original_BLD):
    new_BLD = x_hat_BLD.astype(original_BLD.dtype)
    return jnp.where(m_BL[..., None], new_BLD, original_BLD)

  logits_BLV, _ = module.apply(
    {'params': lm_params}, ids_BL, edits={site: splice}
  )
  log_q_BLV = jax.nn.log_softmax(logits_BLV)
  kl_BL = jnp.sum(jnp.exp(log_p_BLV) * (log_p_BLV - log_q_BLV), -1)
  total = lambda value_BL: jnp.sum(jnp.where(m_BL, value_BL, 0.0))
  dot_BL = jnp.sum(x_BLD * x_hat_BLD, -1)
  x2_BL = jnp.sum(x_BLD**2, -1)
  x_hat2_BL = jnp.sum(x_hat_BLD**2, -1)
  norms_BL = jnp.sqrt(x2_BL * x_hat2_BL)
  fired_BLF = (f_BLF > 0) & m_BL[..., None]
  sums = {
    'ce': cross_entropy(log_q_BLV, ids_BL, m_BL),
    'kl': jnp.sum(jnp.where(m_BL[:, :-1], kl_BL[:, :-1], 0.0)),
    'tokens': jnp.sum(m_BL, dtype=jnp.float32),
    'l0': jnp.sum(fired_BLF, dtype=jnp.float32),
    'fired': jnp.sum(fired_BLF, (0, 1), dtype=jnp.float32),
    'error': total(jnp.sum((x_BLD - x_hat_BLD) ** 2, -1)),
    'x': jnp.sum(jnp.where(m_BL[..., None], x_BLD, 0.0), (0, 1)),
    'x_squared': total(x2_BL),
    'x_hat_squared': total(x_hat2_BL),
    'dot': total(dot_BL),
    'cosine': total(dot_BL / jnp.maximum(norms_BL, 1e-30)),
  }
  return jax.lax.psum(sums, AXIS)


class Devices:
  """Where contexts are split over, by pmap or by a mesh: one interface.

  `spread` puts a batch on the devices, `copy` a tree on each of them, and
  `compile` turns one of the passes above into a program over all of them. A
  pass's sums come back replicated, what it keeps stays where it was made.
  """

  def __init__(self, parallel: str):
    self.parallel = parallel
    self.count = jax.local_device_count()
    self._mesh = None if parallel == 'pmap' else make_mesh(-1, 1)

  def copy(self, tree: Any) -> Any:
    if self.parallel == 'pmap':
      return jax_utils.replicate(tree)
    return jax.device_put(tree, NamedSharding(self._mesh, P()))

  def spread(self, value: np.ndarray) -> Any:
    if self.parallel == 'pmap':
      return value.reshape(self.count, -1, *value.shape[1:])
    return jax.device_put(value, NamedSharding(self._mesh, P(AXIS)))

  def compile(
    self, fn: Callable[..., Any], copied: tuple[bool, ...], kept: int = 0
  ) -> Callable[..., Any]:
    """Compiles a pass.

    Args:
      fn: returns sums, followed by `kept` outputs that stay split.
      copied: for each argument, whether it is a copied tree or a split one.
      kept: see `fn`.
    """
    if self.parallel == 'pmap':
      out_axes = (None, *[0] * kept) if kept else None
      return jax.pmap(fn, axis_name=AXIS, out_axes=out_axes)
    out_specs = (P(), *[P(AXIS)] * kept) if kept else P()
    return jax.jit(
      jax.shard_map(
        fn,
        mesh=self._mesh,
        in_specs=tuple(P() if c else P(AXIS) for c in copied),
        out_specs=out_specs,
      )
    )


class Evaluator:
  """Evaluates SAEs on a fixed set of contexts."""

  def __init__(
    self,
    lm: LanguageModel,
    contexts: Contexts,
    *,
    tokens: int,
    batch_size: int,
    parallel: str,
  ):
    """Fixes what is evaluated on.

    Args:
      lm: the language model.
      contexts: held-out text, with at least `tokens` positions in the mask.
      tokens: positions to count; those beyond are masked out.
      batch_size: contexts per pass, over all devices.
      parallel: 'pmap' or 'mesh'.
    """
    self._lm = lm
    self._devices = Devices(parallel)
    self._params = self._devices.copy(lm.params)
    rank_CL = np.cumsum(contexts.mask_CL).reshape(contexts.mask_CL.shape)
    mask_CL = contexts.mask_CL & (rank_CL <= tokens)
    # The last batch is filled up with contexts of weight 0.
    missing = -len(mask_CL) % batch_size
    pad = ((0, missing), (0, 0))
    self._ids = np.pad(contexts.ids_CL, pad).reshape(
      -1, batch_size, mask_CL.shape[1]
    )
    self._mask = np.pad(mask_CL, pad).reshape(self._ids.shape)
    self._zero = {}
    # One program per architecture, shape and site, for the evaluator's life.
    self._clean = functools.lru_cache(None)(self._compile_clean)
    self._ablated = functools.lru_cache(None)(self._compile_ablated)
    self._spliced = functools.lru_cache(None)(self._compile_spliced)

  def _compile_clean(self, sites):
    fn = functools.partial(clean_pass, self._lm.module, sites)
    return self._devices.compile(fn, (True, False, False), kept=2)

  def _compile_ablated(self, site):
    fn = functools.partial(ablated_pass, self._lm.module, site)
    return self._devices.compile(fn, (True, False, False))

  def _compile_spliced(self, sae, site):
    fn = functools.partial(spliced_pass, self._lm.module, sae, site)
    copied = (True, False, False, False, False, True)
    return self._devices.compile(fn, copied)

  def run(
    self, saes: dict[str, tuple[nn.Module, str, dict[str, np.ndarray]]]
  ) -> dict[str, tuple[dict, dict, dict]]:
    """Sums for every SAE.

    Args:
      saes: module, site and parameters (for raw activations) by name.

    Returns:
      clean, zero-ablation and spliced sums by name, as `metrics.record` takes
      them.
    """
    sites = tuple(dict.fromkeys(site for _, site, _ in saes.values()))
    params = {k: self._devices.copy(p) for k, (_, _, p) in saes.items()}
    clean = Accumulator()
    zero = {s: Accumulator() for s in sites if s not in self._zero}
    spliced = {name: Accumulator() for name in saes}
    for ids, mask in self._batches():
      sums, log_p, x = self._clean(sites)(self._params, ids, mask)
      clean.add(jax.device_get(sums))
      for site, total in zero.items():
        sums = self._ablated(site)(self._params, ids, mask)
        total.add(jax.device_get(sums))
      for name, (module, site, _) in saes.items():
        program = self._spliced(module, site)
        sums = program(self._params, ids, mask, log_p, x[site], params[name])
        spliced[name].add(jax.device_get(sums))
    # The ablation does not depend on the SAE: once per site is enough.
    self._zero |= {site: total.sums for site, total in zero.items()}
    return {
      name: (clean.sums, self._zero[site], spliced[name].sums)
      for name, (_, site, _) in saes.items()
    }

  def _batches(self) -> Iterator[tuple[Any, Any]]:
    for ids_BL, mask_BL in zip(self._ids, self._mask, strict=True):
      yield self._devices.spread(ids_BL), self._devices.spread(mask_BL)
