"""Runs the language model with and without SAEs, over all devices.

The clean pass leaves its activations and last hidden states on the devices; each
spliced pass starts from the former; and one comparison makes logits of all
hidden states, a few positions at a time, so that no `[B, L, V]` is held. Only
rows in the mask are replaced, by the reconstruction or by zeros alike, and
predictions are counted that are made from such rows: special tokens keep their
activations.
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

from gsae_jax.errors import UserError
from gsae_jax.evaluation.metrics import Accumulator
from gsae_jax.lm.layouts import Layout
from gsae_jax.lm.text import Contexts
from gsae_jax.lm.transformer import Transformer, unembed
from gsae_jax.lm.weights import LanguageModel
from gsae_jax.sae import SPECS

AXIS = 'data'

# Logits of a device that are held at a time, of each model that is compared.
_LOGITS = 2**25


def clean_pass(module: Transformer, sites: tuple[str, ...], lm_params, ids_BL):
  """Hidden states `[B, L, D]` and activations by site, unchanged."""
  return module.apply(
    {'params': lm_params}, ids_BL, sites=sites, output='hidden'
  )


def ablated_pass(module: Transformer, site: str, lm_params, ids_BL, m_BL):
  """Hidden states with the site's rows set to zero (paper 2.3)."""
  zero = lambda x_BLD: jnp.where(m_BL[..., None], 0, x_BLD)
  hidden, _ = module.apply(
    {'params': lm_params}, ids_BL, edits={site: zero}, output='hidden'
  )
  return hidden


def spliced_pass(
  module: Transformer,
  sae: nn.Module,
  site: str,
  lm_params,
  ids_BL,
  m_BL,
  x_BLD,
  sae_params,
):
  """Sums of one SAE, and hidden states with its reconstruction in place."""
  x_BLD = x_BLD.astype(jnp.float32)
  out = sae.apply({'params': sae_params}, x_BLD)
  f_BLF, x_hat_BLD = out['f'], out['x_hat']

  def splice(original_BLD):
    new_BLD = x_hat_BLD.astype(original_BLD.dtype)
    return jnp.where(m_BL[..., None], new_BLD, original_BLD)

  hidden, _ = module.apply(
    {'params': lm_params}, ids_BL, edits={site: splice}, output='hidden'
  )
  total = lambda value_BL: jnp.sum(jnp.where(m_BL, value_BL, 0.0))
  dot_BL = jnp.sum(x_BLD * x_hat_BLD, -1)
  x2_BL = jnp.sum(x_BLD**2, -1)
  x_hat2_BL = jnp.sum(x_hat_BLD**2, -1)
  norms_BL = jnp.sqrt(x2_BL * x_hat2_BL)
  fired_BLF = (f_BLF > 0) & m_BL[..., None]
  sums = {
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
  return sums, hidden


def comparison(
  module: Transformer, parts: int, lm_params, ids_BL, m_BL, clean_BLD, others
):
  """Cross-entropies of all, and the divergence of each from the clean model.

  Args:
    module: the language model.
    parts: that B is divided into beyond this program's sight.
    lm_params: its parameters.
    ids_BL: token ids.
    m_BL: the mask; predictions made from its rows are counted.
    clean_BLD: hidden states of the unchanged model.
    others: tuple of hidden states to compare.

  Returns:
    sums: `predictions`, `ce` of the clean model, and for each other one
    `other_ce` and `kl`, `[S]`.
  """
  B, L = ids_BL.shape
  size = -(-B // parts) * L * module.config.vocabulary
  chunks = next(
    n for n in range(1, L + 1) if L % n == 0 and size <= n * _LOGITS or n == L
  )
  # Nothing is predicted from a context's last position.
  counted_BL = m_BL.at[:, -1].set(False)
  next_BL = jnp.roll(ids_BL, -1, axis=1)

  def chunked(x):  # Position first, and C of them at a time: [n, ..., C, ...].
    at = x.ndim - 2 if x.ndim > 2 else 1
    shape = (*x.shape[:at], chunks, L // chunks, *x.shape[at + 1 :])
    return jnp.moveaxis(x.reshape(shape), at, 0)

  def compare(chunk):
    next_BC, counted_BC, clean_BCD, others_SBCD = chunk

    def log_probabilities(hidden):
      return jax.nn.log_softmax(unembed(module.config, lm_params, hidden))

    def cross_entropy(log_p_BCV):
      # A sum, because the vocabulary may be divided over devices.
      hit = next_BC[..., None] == jnp.arange(log_p_BCV.shape[-1])
      picked_BC = jnp.sum(jnp.where(hit, log_p_BCV, 0.0), -1)
      return -jnp.sum(jnp.where(counted_BC, picked_BC, 0.0))

    log_p_BCV = log_probabilities(clean_BCD)

    def against_clean(hidden):
      log_q_BCV = log_probabilities(hidden)
      kl_BC = jnp.sum(jnp.exp(log_p_BCV) * (log_p_BCV - log_q_BCV), -1)
      kl = jnp.sum(jnp.where(counted_BC, kl_BC, 0.0))
      return {'other_ce': cross_entropy(log_q_BCV), 'kl': kl}

    return {
      'ce': cross_entropy(log_p_BCV),
      'predictions': jnp.sum(counted_BC, dtype=jnp.float32),
    } | jax.lax.map(against_clean, others_SBCD)

  split = map(chunked, (next_BL, counted_BL, clean_BLD, jnp.stack(others)))
  sums = jax.lax.map(compare, tuple(split))
  return jax.tree.map(lambda v: jnp.sum(v, 0), sums)


class Devices:
  """Where contexts are divided over, by pmap or by a mesh: one interface.

  `spread` puts a batch on the devices, `language_model` and `sae` parameters,
  and `compile` turns one of the passes above into a program over all devices. A
  program's sums come back whole, what else it gives stays where it was made.
  """

  def __init__(self, parallel: str, layout: Layout):
    """Takes 'pmap', 'mesh', or 'auto': pmap where devices hold the whole model.

    Raises:
      UserError: pmap is asked for, and they do not.
    """
    whole = layout.kind == 'replicated'
    if parallel == 'auto':
      parallel = 'pmap' if whole else 'mesh'
    if parallel == 'pmap' and not whole:
      raise UserError(
        "eval.parallel: with 'pmap' every device holds the language model, "
        f"which lm.layout, {layout.kind!r}, divides; set it to 'mesh' or 'auto'"
      )
    self.parallel = parallel
    self.layout = layout

  def language_model(self, lm: LanguageModel) -> Any:
    if self.parallel == 'pmap':
      return jax_utils.replicate(lm.load())
    return lm.load(self.layout.place)

  def sae(self, params: dict[str, np.ndarray]) -> Any:
    """Features are divided as the language model's heads are."""
    if self.parallel == 'pmap':
      return jax_utils.replicate(params)
    size = self.layout.mesh.shape['model']
    out = {}
    for name, value in params.items():
      spec = SPECS.get(name, P())
      divided = [n for n, axis in zip(value.shape, spec, strict=False) if axis]
      if any(n % size for n in divided):
        spec = P()
      out[name] = jax.device_put(value, NamedSharding(self.layout.mesh, spec))
    return out

  def spread(self, value: np.ndarray) -> Any:
    if self.parallel == 'pmap':
      return value.reshape(self.layout.parts, -1, *value.shape[1:])
    return jax.device_put(value, self.layout.contexts)

  def compile(
    self, fn: Callable[..., Any], *, sums: bool, kept: bool
  ) -> Callable[..., Any]:
    """Compiles a pass, whose first argument is the language model's parameters.

    Args:
      fn: returns sums, or something to keep where it is, or both in that order.
      sums: whether it returns sums.
      kept: whether it returns something else.
    """
    if self.parallel == 'pmap':

      def on_each(*args):
        out = fn(*args)
        if not sums:
          return out
        if not kept:
          return jax.lax.psum(out, AXIS)
        return jax.lax.psum(out[0], AXIS), out[1]

      out_axes = (None, 0) if sums and kept else None if sums else 0
      return jax.pmap(on_each, axis_name=AXIS, out_axes=out_axes)
    whole = self.layout.everywhere
    out = (whole, None) if sums and kept else whole if sums else None
    return jax.jit(
      lambda lm_params, *args: fn(self.layout.gather(lm_params), *args),
      out_shardings=out,
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
    layout: Layout,
  ):
    """Fixes what is evaluated on.

    Args:
      lm: the language model.
      contexts: held-out text, with at least `tokens` positions in the mask.
      tokens: positions to count; those beyond are masked out.
      batch_size: contexts per pass, over all devices.
      parallel: 'pmap', 'mesh' or 'auto'.
      layout: of the language model.

    Raises:
      UserError: `batch_size` cannot be divided as the layout does.
    """
    if batch_size % layout.parts:
      raise UserError(
        f'eval.batch_size: {batch_size} is not divisible by {layout.parts}, over '
        'which contexts are divided'
      )
    self._lm = lm
    self._devices = Devices(parallel, layout)
    self._params = self._devices.language_model(lm)
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
    parts = 1 if self._devices.parallel == 'pmap' else layout.parts
    self._compare = self._devices.compile(
      functools.partial(comparison, lm.module, parts), sums=True, kept=False
    )

  def _compile_clean(self, sites):
    fn = functools.partial(clean_pass, self._lm.module, sites)
    return self._devices.compile(fn, sums=False, kept=True)

  def _compile_ablated(self, site):
    fn = functools.partial(ablated_pass, self._lm.module, site)
    return self._devices.compile(fn, sums=False, kept=True)

  def _compile_spliced(self, sae, site):
    fn = functools.partial(spliced_pass, self._lm.module, sae, site)
    return self._devices.compile(fn, sums=True, kept=True)

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
    params = {k: self._devices.sae(p) for k, (_, _, p) in saes.items()}
    clean = Accumulator()
    # The ablation does not depend on the SAE: once per site is enough.
    zero = {s: Accumulator() for s in sites if s not in self._zero}
    spliced = {name: Accumulator() for name in saes}
    for ids, mask in self._batches():
      hidden, x = self._clean(sites)(self._params, ids)
      others = [self._ablated(s)(self._params, ids, mask) for s in zero]
      for name, (module, site, _) in saes.items():
        program = self._spliced(module, site)
        sums, other = program(self._params, ids, mask, x[site], params[name])
        spliced[name].add(jax.device_get(sums))
        others.append(other)
      sums = jax.device_get(
        self._compare(self._params, ids, mask, hidden, tuple(others))
      )
      clean.add({name: sums[name] for name in ('ce', 'predictions')})
      for i, total in enumerate((*zero.values(), *spliced.values())):
        total.add({'ce': sums['other_ce'][i], 'kl': sums['kl'][i]})
    self._zero |= {site: total.sums for site, total in zero.items()}
    return {
      name: (clean.sums, self._zero[site], spliced[name].sums)
      for name, (_, site, _) in saes.items()
    }

  def _batches(self) -> Iterator[tuple[Any, Any]]:
    for ids_BL, mask_BL in zip(self._ids, self._mask, strict=True):
      yield self._devices.spread(ids_BL), self._devices.spread(mask_BL)
