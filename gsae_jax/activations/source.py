"""Runs the language model to fill buffers of rows, for a store or a stream.

Rows come in a random order: contexts are permuted in windows of the text, and
rows within a buffer. Both orders are functions of the seed, so that any buffer
can be made alone, by anybody, and made again.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax.activations.forward import Forward, nothing
from gsae_jax.activations.layout import ROW_ARRAYS, Encoding
from gsae_jax.activations.windows import Window, Windows
from gsae_jax.lm import text as text_lib
from gsae_jax.lm.layouts import make_layout
from gsae_jax.lm.text import Contexts
from gsae_jax.lm.weights import DTYPES, load_language_model

_PILOT_ROWS = 65_536  # Whose mean is removed before the cast to bfloat16.


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
    forward: Forward,
    windows: Iterable[Contexts],
    *,
    rows: int,
    buffer_rows: int,
    dtype: str,
    seed: int,
    epoch: int = 0,
  ):
    """Plans the buffers; the model does not run yet.

    Args:
      forward: runs the language model.
      windows: contexts, so many at a time, each time from the first; at least
        `rows` of their positions are in the mask.
      rows: N.
      buffer_rows: rows that are permuted together, in host memory.
      dtype: what rows are stored as.
      seed: of both orders.
      epoch: each has an order of its own; a store is the first.
    """
    self.sites = forward.sites
    self.widths = forward.widths
    self.rows = rows
    self.buffer_rows = buffer_rows
    self.buffers = -(-rows // buffer_rows)
    self._dtype = np.dtype(DTYPES[dtype])
    self._seed = seed
    self._forward = forward
    self.epoch = epoch
    self._windows = Windows(windows, seed, epoch)

  def digest(self) -> str:
    """SHA-256 of every context of the first window and of their order.

    Of a text that is one window, that is all but the model itself.
    """
    self._windows.rewind()
    window = self._windows.current
    contexts = window.contexts
    digest = hashlib.sha256()
    digest.update(np.ascontiguousarray(contexts.ids_CL).data)
    for of in (contexts.mask, contexts.special, contexts.documents):
      for chosen in contexts.slices():
        digest.update(np.ascontiguousarray(of(chosen)).data)
    digest.update(window.order_C.data)
    return digest.hexdigest()

  def set_epoch(self, epoch: int) -> None:
    """Permutes the contexts anew, from the first window on."""
    self.epoch = epoch
    self._windows.restart(epoch)

  def close(self) -> None:
    """Leaves the text; the window in hand can still be used."""
    self._windows.close()

  def encodings(self) -> dict[str, Encoding]:
    """Mean and scale of each site, from the first rows of the order."""
    nothing_done = dict.fromkeys(self.sites)
    sums = {site: np.zeros(width) for site, width in self.widths.items()}
    squares = {site: np.zeros(width) for site, width in self.widths.items()}
    count = 0
    rows = min(_PILOT_ROWS, self.rows)
    for window in self._windows.covering(0, rows, nothing):
      chosen_C, _ = window.holding(0, rows - window.first_row)
      for mask_BL, taken in self._forward.passes(
        window.contexts, chosen_C, nothing_done, jnp.float32
      ):
        count += int(mask_BL.sum())
        for site, x_BLD in taken.items():
          x_ND = x_BLD[mask_BL].astype(np.float64)
          sums[site] += x_ND.sum(0)
          squares[site] += (x_ND**2).sum(0)
    encodings = {}
    for site in self.sites:
      mean_D = sums[site] / count
      # Of a site that never changes there is nothing to scale.
      mean_square = float(np.mean(squares[site] / count - mean_D**2))
      variance = max(mean_square, 0.0) or 1.0
      encodings[site] = Encoding(
        mean_D=mean_D.astype(np.float32),
        scale=np.float32(2.0 ** np.round(np.log2(variance) / 2)),
      )
    return encodings

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
    rng = np.random.default_rng((self._seed, 1, self.epoch, number))
    place_N = rng.permutation(stop - start)
    values = {k: np.empty(stop - start, v) for k, v in ROW_ARRAYS.items()}
    for site, width in self.widths.items():
      values[site] = np.empty((stop - start, width), self._dtype)
    for window in self._windows.covering(start, stop, tick):
      first = max(start, window.first_row)
      last = min(stop, window.end_row)
      self._fill(
        values,
        place_N[first - start : last - start],
        window,
        slice(first - window.first_row, last - window.first_row),
        encodings,
        tick,
      )
    return values

  def _fill(
    self,
    values: dict[str, np.ndarray],
    place_N: np.ndarray,
    window: Window,
    rows: slice,
    encodings: Mapping[str, Encoding | None],
    tick: Callable[[], None],
  ) -> None:
    """Puts some rows of a window where they belong in a buffer."""
    contexts = window.contexts
    # Where each usable position goes. A context that straddles two buffers runs
    # for both; what belongs to the other goes nowhere.
    chosen_C, keep = window.holding(rows.start, rows.stop)
    mask_CL = contexts.mask(chosen_C)
    shape = mask_CL.shape
    positions_CL = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    numbers_C = (window.first_context + chosen_C).astype(np.int32)
    for name, source_CL in (
      ('token_ids', contexts.ids_CL[chosen_C]),
      ('positions', positions_CL),
      ('context_ids', np.broadcast_to(numbers_C[:, None], shape)),
      ('document_ids', contexts.documents(chosen_C)),
      ('special', contexts.special(chosen_C)),
    ):
      values[name][place_N] = source_CL[mask_CL][keep]
    at = -keep.start  # Of the batch's first row, before the permutation.
    for mask_BL, taken in self._forward.passes(
      contexts, chosen_C, encodings, self._dtype, tick
    ):
      count = int(mask_BL.sum())
      mine = slice(max(at, 0), min(at + count, len(place_N)))
      for site, x_BLD in taken.items():
        x_ND = x_BLD[mask_BL][mine.start - at : mine.stop - at]
        values[site][place_N[mine]] = x_ND
      at += count


def open_source(
  *,
  lm: dict[str, Any],
  text: dict[str, Any],
  store: dict[str, Any],
  sites: tuple[str, ...],
  seed: int,
  devices: list[jax.Device],
  model: int,
  tick: Callable[[], None] = nothing,
) -> tuple[Source, dict[str, Any], dict[str, Any]]:
  """The source that a config describes.

  Args:
    lm: arguments of `load_language_model`, and `layout`.
    text: the config's fields `text.*`.
    store: the config's fields `store.*`.
    sites: names of the sites.
    seed: of the order of rows.
    devices: to run on.
    model: size of the axis that a divided model's heads go over.
    tick: called while text is read or waited for; may raise, to leave.

  Returns:
    the source, the identity of what it makes (everything that determines it, as
    plain data), and its provenance.
  """
  text_lib.check(text)  # Before the model is loaded.
  lm = dict(lm)
  kind = lm.pop('layout')
  opened = load_language_model(**lm)
  config = opened.module.config
  for site in sites:  # Before the text is read.
    config.check_site(site)
  opened.check_context_length(text['context_length'])
  text = text_lib.resolve(text, opened.tokenizer)
  prepared = text_lib.prepare(
    text, opened.tokenizer, part='train', rows=store['tokens'], tick=tick
  )
  forward = Forward(
    opened,
    sites,
    layout=make_layout(kind, config, opened.bytes, devices, model),
    batch_contexts=store['batch_contexts'],
    length=text['context_length'],
    # Means are taken of float32.
    dtypes=(store['dtype'], *(['float32'] if store['centre'] else [])),
  )
  source = Source(
    forward,
    prepared.windows,
    rows=store['tokens'],
    buffer_rows=store['buffer_rows'],
    dtype=store['dtype'],
    seed=seed,
  )
  # The documents say better than the path what the text is.
  policy = {k: v for k, v in text.items() if k != 'path'}
  kept = {k: v for k, v in store.items() if k != 'batch_contexts'}
  identity = {
    'lm': opened.identity,
    'text': policy | {'documents': prepared.documents},
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
