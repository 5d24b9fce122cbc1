"""Evaluates SAEs by splicing their reconstructions in, over all devices."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.errors import UserError
from gsae_jax.evaluation import passes
from gsae_jax.evaluation.metrics import Accumulator
from gsae_jax.lm.layouts import Layout
from gsae_jax.lm.text import Contexts
from gsae_jax.lm.weights import LanguageModel
from gsae_jax.sae import SPECS

AXIS = 'data'

# Of a device's memory, for parameters of SAEs that are evaluated together.
_SHARE = 0.25


class Devices:
  """Where contexts are divided over, by pmap or by a mesh: one interface.

  `spread` puts a batch on the devices, `language_model` and `sae` parameters,
  and `compile` turns one of the passes into a program over all devices. A
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
    """Its parameters, as the layout says."""
    if self.parallel == 'pmap':
      return lm.load(put=self._on_each)
    return lm.load(self.layout.place)

  def sae(self, params: dict[str, np.ndarray]) -> Any:
    """Parameters of one SAE."""
    if self.parallel == 'pmap':
      return {name: self._on_each(value) for name, value in params.items()}
    return {
      name: jax.device_put(value, self.place_sae(name, value.shape))
      for name, value in params.items()
    }

  def _on_each(self, value: np.ndarray) -> jax.Array:
    """`[devices, ...]` for pmap; the host makes no copy of it for each."""
    mesh = self.layout.mesh
    return jax.make_array_from_single_device_arrays(
      (mesh.size, *value.shape),
      NamedSharding(mesh, P(('data', 'model'))),
      [jax.device_put(value[None], device) for device in mesh.devices.flat],
    )

  def groups(self, saes: dict[str, tuple]) -> list[dict[str, tuple]]:
    """SAEs in order, so many together as devices have room for."""
    stats = self.layout.mesh.local_devices[0].memory_stats()
    limit = _SHARE * stats['bytes_limit'] if stats else np.inf
    groups, held = [], 0
    for name, sae in saes.items():
      size = sum(self._bytes(k, v) for k, v in sae[2].items())
      if not groups or held + size > limit:
        groups.append({})
        held = 0
      groups[-1][name] = sae
      held += size
    return groups

  def _bytes(self, name: str, value: np.ndarray) -> int:
    """Of a device that a parameter takes."""
    if self.parallel == 'pmap':
      return value.nbytes
    part = self.place_sae(name, value.shape).shard_shape(value.shape)
    return int(np.prod(part)) * value.dtype.itemsize

  def place_sae(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Features are divided as the language model's heads are, if they can be."""
    mesh, spec = self.layout.mesh, SPECS.get(name, P())
    divided = [n for n, axis in zip(shape, spec, strict=False) if axis]
    if any(n % mesh.shape['model'] for n in divided):
      spec = P()
    return NamedSharding(mesh, spec)

  def spread(self, value: np.ndarray) -> Any:
    """A batch `[B, ...]`, or `[devices, B / devices, ...]` for pmap."""
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
      functools.partial(passes.comparison, lm.module, parts),
      sums=True,
      kept=False,
    )

  def _compile_clean(self, sites):
    fn = functools.partial(passes.clean_pass, self._lm.module, sites)
    return self._devices.compile(fn, sums=False, kept=True)

  def _compile_ablated(self, site):
    fn = functools.partial(passes.ablated_pass, self._lm.module, site)
    return self._devices.compile(fn, sums=False, kept=True)

  def _compile_spliced(self, sae, site):
    fn = functools.partial(passes.spliced_pass, self._lm.module, sae, site)
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
    return {
      name: sums
      for group in self._devices.groups(saes)
      for name, sums in self._run(group).items()
    }

  def _run(self, saes):
    """The same of SAEs whose parameters are on the devices together."""
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
