"""Runs the language model to fill buffers of rows, for a store or a stream.

Rows come in a random order: contexts are permuted over the whole text, and rows
within a buffer. Both orders are functions of the seed, so that any buffer can be
made alone, by anybody, and made again.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax.activations.layout import Encoding
from gsae_jax.lm import text as text_lib
from gsae_jax.lm.layouts import Layout, make_layout
from gsae_jax.lm.text import Contexts
from gsae_jax.lm.weights import DTYPES, LanguageModel, load_language_model

_PILOT_ROWS = 65_536  # Whose mean is removed before the cast to bfloat16.


def nothing() -> None:
  """What is called between two passes of the model when nobody asks."""


class Source:
  """Makes buffers of rows from contexts.

  Attributes:
    sites: names of the sites, all filled in one pass over the model.
    widths: D by site.
    rows: N.
    buffers: how many there are; the last may be shorter.
  """

  def __init__(
    self,
    lm: LanguageModel,
    contexts: Contexts,
    *,
    sites: tuple[str, ...],
    rows: int,
    buffer_rows: int,
    batch_contexts: int,
    dtype: str,
    seed: int,
    layout: Layout,
    epoch: int = 0,
  ):
    """Plans the buffers; nothing runs yet.

    Args:
      lm: the language model.
      contexts: at least `rows` of their positions are in the mask.
      sites: which activations to keep.
      rows: N.
      buffer_rows: rows that are permuted together, in host memory.
      batch_contexts: contexts of each part of the layout and forward pass. The
        numbers depend on it in their last bits, and not on how many parts.
      dtype: what rows are stored as.
      seed: of both orders.
      layout: of the model, and of the contexts of a pass.
      epoch: each has an order of its own; a store is the first.
    """
    self.sites = sites
    self.widths = {s: lm.module.config.check_site(s) for s in sites}
    self.rows = rows
    self.buffer_rows = buffer_rows
    self.buffers = -(-rows // buffer_rows)
    self._dtype = np.dtype(DTYPES[dtype])
    self._contexts = contexts
    self._seed = seed
    self._batch = batch_contexts * layout.parts
    self._split = layout.contexts
    self._params = lm.load(
      layout.place, blocks=lm.module.config.blocks_for(sites)
    )
    self.set_epoch(epoch)

    @functools.partial(jax.jit, static_argnames='dtype')
    def forward(params, ids_BL, encodings, dtype):
      _, taken = lm.module.apply(
        {'params': layout.gather(params)}, ids_BL, sites=sites, output=None
      )
      out = {}
      for site in sites:
        x_BLD = taken[site]
        if encodings[site] is not None:
          mean_D, scale = encodings[site]
          x_BLD = (x_BLD.astype(jnp.float32) - mean_D) / scale
        out[site] = x_BLD.astype(dtype)
      return out

    self.forward = forward

  def digest(self) -> str:
    """SHA-256 of every context and of their order: all but the model itself."""
    digest = hashlib.sha256()
    c = self._contexts
    for array in (c.ids_CL, c.mask_CL, c.special_CL, c.documents_CL):
      digest.update(np.ascontiguousarray(array))
    digest.update(self._order_C)
    return digest.hexdigest()

  def set_epoch(self, epoch: int) -> None:
    """Permutes the contexts anew."""
    self.epoch = epoch
    self._order_C = np.random.default_rng((self._seed, 0, epoch)).permutation(
      len(self._contexts.ids_CL)
    )
    self._ends_C = np.cumsum(self._contexts.mask_CL.sum(1)[self._order_C])

  def encodings(self) -> dict[str, Encoding]:
    """Mean and scale of each site, from the first rows of the order."""
    last = int(np.searchsorted(self._ends_C, min(_PILOT_ROWS, self.rows)))
    chosen_C = self._order_C[: last + 1]
    nothing_done = dict.fromkeys(self.sites)
    sums = {site: np.zeros(width) for site, width in self.widths.items()}
    squares = {site: np.zeros(width) for site, width in self.widths.items()}
    count = 0
    for mask_BL, taken in self._passes(chosen_C, nothing_done, jnp.float32):
      count += int(mask_BL.sum())
      for site, x_BLD in taken.items():
        x_ND = x_BLD[mask_BL].astype(np.float64)
        sums[site] += x_ND.sum(0)
        squares[site] += (x_ND**2).sum(0)
    encodings = {}
    for site in self.sites:
      mean_D = sums[site] / count
      # Of a site that never changes there is nothing to scale.
      variance = max(np.mean(squares[site] / count - mean_D**2), 0.0) or 1.0
      encodings[site] = Encoding(
        mean_D=mean_D.astype(np.float32),
        scale=np.float32(2.0 ** np.round(np.log2(variance) / 2)),
      )
    return encodings

  def _passes(
    self, chosen_C: np.ndarray, encodings, dtype, tick=nothing
  ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Yields mask and activations of one batch after the other.

    The next pass runs while the last one's activations are being used.
    """
    plain = {
      site: e and (e.mean_D, np.float32(e.scale))
      for site, e in encodings.items()
    }

    def start(i):
      ids_BL = self._contexts.ids_CL[chosen_C[i : i + self._batch]]
      missing = self._batch - len(ids_BL)
      ids_BL = np.pad(ids_BL, ((0, missing), (0, 0)))
      ids_BL = jax.device_put(ids_BL, self._split)
      return self.forward(self._params, ids_BL, plain, dtype=dtype)

    running = start(0)
    for i in range(0, len(chosen_C), self._batch):
      tick()
      taken = running
      if i + self._batch < len(chosen_C):
        running = start(i + self._batch)
      mask_BL = self._contexts.mask_CL[chosen_C[i : i + self._batch]]
      yield (
        mask_BL,
        {k: v[: len(mask_BL)] for k, v in jax.device_get(taken).items()},
      )

  def buffer(
    self,
    number: int,
    encodings: Mapping[str, Encoding | None],
    tick: Callable[[], None] = nothing,
  ) -> dict[str, np.ndarray]:
    """The rows of one buffer: the row arrays, and `[rows, D]` for every site.

    Args:
      number: of the buffer.
      encodings: how each site's rows are encoded.
      tick: called before each pass of the model; may raise, to leave.
    """
    start = number * self.buffer_rows
    stop = min(start + self.buffer_rows, self.rows)
    first = int(np.searchsorted(self._ends_C, start, side='right'))
    last = int(np.searchsorted(self._ends_C, stop, side='left'))
    chosen_C = self._order_C[first : last + 1]
    before = int(self._ends_C[first - 1]) if first else 0
    mask_CL = self._contexts.mask_CL[chosen_C]
    # Where each usable position goes. A context that straddles two buffers runs
    # for both; what belongs to the other goes nowhere.
    keep = slice(start - before, stop - before)
    rng = np.random.default_rng((self._seed, 1, self.epoch, number))
    place_N = rng.permutation(stop - start)
    shape = mask_CL.shape
    positions_CL = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    contexts_CL = np.broadcast_to(chosen_C.astype(np.int32)[:, None], shape)
    values = {}
    for name, source_CL in (
      ('token_ids', self._contexts.ids_CL[chosen_C]),
      ('positions', positions_CL),
      ('context_ids', contexts_CL),
      ('document_ids', self._contexts.documents_CL[chosen_C]),
      ('special', self._contexts.special_CL[chosen_C]),
    ):
      values[name] = np.empty(stop - start, source_CL.dtype)
      values[name][place_N] = source_CL[mask_CL][keep]
    for site, width in self.widths.items():
      values[site] = np.empty((stop - start, width), self._dtype)
    at = -keep.start  # Of the batch's first row, before the permutation.
    for mask_BL, taken in self._passes(chosen_C, encodings, self._dtype, tick):
      rows = int(mask_BL.sum())
      mine = slice(max(at, 0), min(at + rows, stop - start))
      for site, x_BLD in taken.items():
        x_ND = x_BLD[mask_BL][mine.start - at : mine.stop - at]
        values[site][place_N[mine]] = x_ND
      at += rows
    return values


def open_source(
  *,
  lm: dict[str, Any],
  text: dict[str, Any],
  store: dict[str, Any],
  sites: tuple[str, ...],
  seed: int,
  devices: list[jax.Device],
  model: int,
) -> tuple[Source, dict[str, Any], dict[str, Any]]:
  """The source that a config describes.

  Args:
    lm: arguments of `load_language_model`, and `layout`.
    text: of `text.prepare`.
    store: the config's fields `store.*`.
    sites: names of the sites.
    seed: of the order of rows.
    devices: to run on.
    model: size of the axis that a divided model's heads go over.

  Returns:
    the source, the identity of what it makes (everything that determines it, as
    plain data), and its provenance.
  """
  lm = dict(lm)
  kind = lm.pop('layout')
  opened = load_language_model(**lm)
  config = opened.module.config
  for site in sites:  # Before the text is read.
    config.check_site(site)
  opened.check_context_length(text['context_length'])
  layout = make_layout(kind, config, opened.bytes, devices, model)
  documents, contexts = text_lib.prepare(
    text, opened.tokenizer, part='train', rows=store['tokens']
  )
  source = Source(
    opened,
    contexts,
    sites=sites,
    rows=store['tokens'],
    buffer_rows=store['buffer_rows'],
    batch_contexts=store['batch_contexts'],
    dtype=store['dtype'],
    seed=seed,
    layout=layout,
  )
  # The documents say better than the path what the text is.
  policy = {k: v for k, v in text.items() if k != 'path'}
  kept = {k: v for k, v in store.items() if k != 'batch_contexts'}
  identity = {
    'lm': opened.identity,
    'text': policy | {'documents': documents.digest},
    'sites': list(sites),
    'store': kept,
    'seed': seed,
    'tokens': source.digest(),
  }
  provenance = {
    'lm_path': lm['path'],
    'lm_revision': lm['revision'],
    'text_path': text['path'],
  }
  return source, identity, provenance
