r"""How well batches are mixed, against a full random permutation.

  python benchmarks/mixing.py --folder=DIR       a minute, 1 GB in DIR

Harvests the quickstart's store with buffers of several sizes, and looks at the
batches that the loader makes of each.
"""

import dataclasses
import os
import shutil

import jax
import numpy as np
from absl import app, flags

from experiments import quickstart
from gsae_jax import config as config_lib
from gsae_jax.activations.loader import Loader
from gsae_jax.activations.source import open_source
from gsae_jax.activations.store import open_store
from gsae_jax.activations.writer import StoreWriter

_FOLDER = flags.DEFINE_string('folder', None, 'For the stores.')
SITE = 'mlp_out.0'
BATCHES = 200


def harvest(path: str, buffer_rows: int) -> None:
  c = config_lib.parse(quickstart.get_config())
  store = dataclasses.asdict(c.store) | {'buffer_rows': buffer_rows}
  source, identity, provenance = open_source(
    lm=dataclasses.asdict(c.lm),
    text=dataclasses.asdict(c.text),
    store=store,
    sites=(SITE,),
    seed=c.seed,
    devices=jax.local_devices(),
    model=1,
  )
  with StoreWriter(
    path,
    identity=identity,
    provenance=provenance,
    widths=source.widths,
    rows=c.store.tokens,
    shard_rows=c.store.shard_rows,
    chunk_rows=c.store.chunk_rows,
    buffer_rows=buffer_rows,
    dtype=c.store.dtype,
    make_encodings=lambda: {SITE: None},
  ) as writer:
    for buffer in writer.missing_buffers():
      writer.put(buffer, source.buffer(buffer, writer.encodings))
    writer.flush()
    writer.finish()


class Measures:
  """Of batches given as numbers of rows."""

  def __init__(self, path: str):
    store = open_store(path)
    read = lambda name: store.array(name)[:].read().result()
    self.contexts = read('context_ids')
    self.documents = read('document_ids')
    x_ND = read(f'{SITE}/activations')
    self.norms = np.linalg.norm(x_ND.astype(np.float64), axis=1)

  def row(self, batches: np.ndarray) -> list[float]:
    distinct = lambda a: np.mean([len(np.unique(a[b])) for b in batches])
    partners = []
    for b in batches:
      _, counts = np.unique(self.contexts[b], return_counts=True)
      partners.append(np.sum(counts * (counts - 1)) / len(b))
    norms_NB = self.norms[batches] - self.norms.mean()
    variance = np.mean(norms_NB**2)
    lag = np.mean(norms_NB[:, 1:] * norms_NB[:, :-1]) / variance
    # Of means over independent rows, this is one.
    means = batches.shape[1] * np.mean(norms_NB.mean(1) ** 2) / variance
    return [
      distinct(self.documents),
      distinct(self.contexts),
      np.mean(partners),
      lag,
      means,
    ]


def show(name: str, values: list[float]) -> None:
  formats = ('.1f', '.1f', '.4f', '+.4f', '.2f')
  cells = (f'{v:{f}}' for v, f in zip(values, formats, strict=True))
  print(f'| {name} | {" | ".join(cells)} |', flush=True)


def main(unused):
  del unused
  c = quickstart.get_config()
  size, shard = c.train.batch_size, c.store.shard_rows
  print(
    '| order | documents | contexts | partners | autocorrelation | variance |'
  )
  print('|---|---|---|---|---|---|')
  for buffer in (shard, 8 * shard, 61 * shard):
    path = os.path.join(_FOLDER.value, f'gsae_mixing_{buffer}')
    harvest(path, buffer)
    measures = Measures(path)
    store = open_store(path)
    if buffer == shard:
      rng = np.random.default_rng(0)
      order = rng.permutation(store.rows)[: BATCHES * size].reshape(-1, size)
      show('full permutation', measures.row(order))
      # As the text runs: contexts in their order, and so their rows.
      text = np.lexsort((np.arange(store.rows), measures.contexts))
      show(
        'the text’s own', measures.row(text[: BATCHES * size].reshape(-1, size))
      )
      rows = np.arange(BATCHES * size).reshape(-1, size)
      show(
        f'written in buffers of {buffer:,}, read in order', measures.row(rows)
      )
    for unit, mixed in (
      ('chunk', size),
      ('chunk', 16 * size),
      ('shard', 8 * shard),
    ):
      loader = Loader(
        store, (SITE,), batch_size=size, seed=0, unit=unit, shuffle_rows=mixed
      )
      batches = np.stack([loader.row_numbers(i) for i in range(BATCHES)])
      show(
        f'buffers of {buffer:,}, {unit}s, {mixed:,} mixed',
        measures.row(batches),
      )
    shutil.rmtree(path)


if __name__ == '__main__':
  flags.mark_flag_as_required('folder')
  app.run(main)
