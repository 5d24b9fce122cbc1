r"""How well batches are mixed, against a full random permutation.

  python -m benchmarks.mixing --folder=DIR       a minute, 1 GB in DIR

Harvests the quickstart's store with buffers of several sizes, and looks at the
batches that the loader makes of each.
"""

import argparse
import dataclasses
import os
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import record
from experiments import quickstart
from gsae_jax import config as config_lib
from gsae_jax.activations.loader import Loader
from gsae_jax.activations.source import open_source
from gsae_jax.activations.store import open_store
from gsae_jax.activations.writer import StoreWriter

SITE = 'mlp_out.0'
BATCHES = 200
FORMATS = {
  'documents': '.1f',
  'contexts': '.1f',
  'partners': '.4f',
  'autocorrelation': '+.4f',
  'variance': '.2f',
}


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

  def row(self, name: str, batches: np.ndarray) -> dict[str, Any]:
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
    values = (
      distinct(self.documents),
      distinct(self.contexts),
      np.mean(partners),
      lag,
      means,
    )
    return {'name': name} | dict(zip(FORMATS, map(float, values), strict=True))


def orders(folder: str) -> Iterator[dict[str, Any]]:
  """A row an order of the quickstart's rows."""
  c = quickstart.get_config()
  size, shard = c.train.batch_size, c.store.shard_rows
  for buffer in (shard, 8 * shard, 61 * shard):
    path = os.path.join(folder, f'gsae_mixing_{buffer}')
    harvest(path, buffer)
    measures = Measures(path)
    store = open_store(path)
    if buffer == shard:
      batches = lambda order: order[: BATCHES * size].reshape(-1, size)
      rng = np.random.default_rng(0)
      order = rng.permutation(store.rows)
      yield measures.row('full permutation', batches(order))
      # As the text runs: contexts in their order, and so their rows.
      text = np.lexsort((np.arange(store.rows), measures.contexts))
      yield measures.row('the text’s own', batches(text))
      name = f'written in buffers of {buffer:,}, read in order'
      yield measures.row(name, batches(np.arange(store.rows)))
    for unit, mixed in (
      ('chunk', size),
      ('chunk', 16 * size),
      ('shard', 8 * shard),
    ):
      loader = Loader(
        store, (SITE,), batch_size=size, seed=0, unit=unit, shuffle_rows=mixed
      )
      yield measures.row(
        f'buffers of {buffer:,}, {unit}s, {mixed:,} mixed',
        np.stack([loader.row_numbers(i) for i in range(BATCHES)]),
      )
    shutil.rmtree(path)


def main():
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--folder', required=True, help='For the stores.')
  flags.add_argument('--results', default=str(record.RESULTS))
  args = flags.parse_args()
  rows = list(orders(args.folder))
  record.append(
    args.results, 'mixing', settings={'batches': BATCHES}, rows=rows
  )
  cells = (
    [row['name'], *(format(row[key], form) for key, form in FORMATS.items())]
    for row in rows
  )
  print(record.table(['order', *FORMATS], cells))


if __name__ == '__main__':
  main()
