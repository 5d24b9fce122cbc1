"""The language model as harvest runs it: token ids in, rows on the host out."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax.activations.layout import Encoding
from gsae_jax.lm.contexts import Contexts
from gsae_jax.lm.layouts import Layout
from gsae_jax.lm.transformer import Transformer
from gsae_jax.lm.weights import LanguageModel

# Tokens of a part of the layout and pass, when nobody says how many: as many as
# keep the matrix units busy, and what suits a CPU's caches.
_MOST_TOKENS, _CPU_TOKENS = 2**16, 2**13
_SHARE = 0.9  # Of a device's memory, for a program and the results of two runs.


def nothing() -> None:
  """What is called between two passes of the model when nobody asks."""


def make_forward(
  module: Transformer, layout: Layout, sites: tuple[str, ...]
) -> jax.stages.Wrapped:
  """The program of a pass, compiled when it is called.

  Returns:
    a function of parameters, ids `[B, L]`, encodings by site (None, or mean and
    scale), and dtype; it gives `[B, L, D]` by site.
  """

  def forward(params, ids_BL, encodings, dtype):
    _, taken = module.apply(
      {'params': layout.gather(params)}, ids_BL, sites=sites, output=None
    )
    out = {}
    for site in sites:
      x_BLD = taken[site]
      if encodings[site] is not None:
        mean_D, scale = encodings[site]
        x_BLD = (x_BLD.astype(jnp.float32) - mean_D[None, None]) / scale
      out[site] = x_BLD.astype(dtype)
    return out

  return jax.jit(forward, static_argnames='dtype')


class Forward:
  """Runs passes over chosen contexts.

  Attributes:
    sites: names of the sites, all taken in one pass, which stops behind the last.
    widths: D by site.
    batch: contexts of a pass, over all devices.
  """

  def __init__(
    self,
    lm: LanguageModel,
    sites: tuple[str, ...],
    *,
    layout: Layout,
    batch_contexts: int | None,
    length: int,
    dtypes: tuple[str, ...],
  ):
    """Puts the parameters that the sites need on the devices.

    Args:
      lm: the language model.
      sites: which activations to take.
      layout: of the model, and of the contexts of a pass.
      batch_contexts: contexts of each part of the layout and pass. The numbers
        depend on it in their last bits, and not on how many parts there are.
        None: as many as fit.
      length: of a context.
      dtypes: that rows will be asked for in.
    """
    self.sites = sites
    self.widths = {s: lm.module.config.check_site(s) for s in sites}
    self._layout = layout
    self._params = lm.load(
      layout.place, blocks=lm.module.config.blocks_for(sites)
    )
    self.run = make_forward(lm.module, layout, sites)
    if batch_contexts is None:
      limit = _limit(layout.mesh.local_devices[0])
      batch_contexts = fitting(
        lambda contexts: max(self._needed(contexts, length, d) for d in dtypes),
        limit,
        length,
      )
    self.batch = batch_contexts * layout.parts

  def _needed(self, contexts: int, length: int, dtype: str) -> float:
    """Bytes of a device that passes of so many contexts take, by the compiler.

    A TPU's refuses what is too large, which is infinity.
    """
    ids = jax.ShapeDtypeStruct(
      (contexts * self._layout.parts, length),
      np.int32,
      sharding=self._layout.contexts,
    )
    nothing_done = dict.fromkeys(self.sites)
    lowered = self.run.lower(self._params, ids, nothing_done, dtype=dtype)
    try:
      found = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as e:
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      return math.inf
    assert found is not None  # Every platform's compiler tells.
    results = 2 * found.output_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + results

  def passes(
    self,
    contexts: Contexts,
    chosen_C: np.ndarray,
    encodings: Mapping[str, Encoding | None],
    dtype: Any,
    tick: Callable[[], None] = nothing,
  ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Yields mask and activations of one batch after the other.

    The next pass runs while the last one's activations are being used.
    """
    plain = {
      site: e and (e.mean_D, np.float32(e.scale))
      for site, e in encodings.items()
    }

    def start(i):
      ids_BL = contexts.ids_CL[chosen_C[i : i + self.batch]]
      missing = self.batch - len(ids_BL)
      ids_BL = np.pad(ids_BL, ((0, missing), (0, 0)))
      ids_BL = jax.device_put(ids_BL, self._layout.contexts)
      return self.run(self._params, ids_BL, plain, dtype=dtype)

    running = start(0)
    for i in range(0, len(chosen_C), self.batch):
      tick()
      taken = running
      if i + self.batch < len(chosen_C):
        running = start(i + self.batch)
      mask_BL = contexts.mask(chosen_C[i : i + self.batch])
      yield (
        mask_BL,
        {k: v[: len(mask_BL)] for k, v in jax.device_get(taken).items()},
      )


def _limit(device: jax.Device) -> int | None:
  stats = device.memory_stats()
  return stats['bytes_limit'] if stats else None


def fitting(
  needed: Callable[[int], float], limit: int | None, length: int
) -> int:
  """How many contexts a pass takes of each part of the layout.

  Args:
    needed: bytes of a device for so many contexts.
    limit: bytes that a device has; None where nothing is known, as of a CPU.
    length: of a context.
  """
  if limit is None:
    return max(_CPU_TOKENS // length, 1)
  contexts = max(_MOST_TOKENS // length, 1)
  while contexts > 1 and needed(contexts) > _SHARE * limit:
    contexts //= 2
  return contexts
