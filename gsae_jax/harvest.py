r"""Fills an activation store from a language model.

  python -m gsae_jax.harvest --config=experiments/quickstart.py --store=DIR

Started again, it skips the shards that are there. Exits 42 when preempted. Run
by several processes (--coordinator), each makes whole buffers of its own.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
import tqdm
from absl import flags

from gsae_jax import config as config_lib
from gsae_jax import processes, program
from gsae_jax.activations import source as source_lib
from gsae_jax.activations.layout import Encoding
from gsae_jax.activations.writer import StoreWriter
from gsae_jax.parsing import plain


def define_flags(values: flags.FlagValues) -> None:
  """Adds the flags of this command."""
  program.define_config(values)
  processes.define_flags(values)
  flags.DEFINE_string(
    'store',
    None,
    'Where to write: a folder, gs:// or s3://.',
    flag_values=values,
  )
  flags.mark_flags_as_required(['config', 'store'], values)


def open_writer(
  path: str,
  config: config_lib.Config,
  source: source_lib.Source,
  identity: dict,
  provenance: dict,
) -> StoreWriter:
  """The writer of the store that a config describes, on every process.

  The first process makes the store and finds out what is missing; the others
  find it there and are told.
  """
  make_encodings: Callable[[], Mapping[str, Encoding | None]]
  make_encodings = lambda: dict.fromkeys(config.sites)
  if config.store.centre:
    make_encodings = source.encodings
  make = functools.partial(
    StoreWriter,
    path,
    identity=plain(identity),
    provenance=provenance,
    widths=source.widths,
    rows=config.store.tokens,
    shard_rows=config.store.shard_rows,
    chunk_rows=config.store.chunk_rows,
    buffer_rows=config.store.buffer_rows,
    dtype=config.store.dtype,
    make_encodings=make_encodings,
  )
  missing = np.zeros(-(-config.store.tokens // config.store.shard_rows), int)
  with processes.together():
    if jax.process_index() == 0:
      writer = make()
      missing = writer.missing.astype(int)
  missing = processes.agreed(missing).astype(bool)
  with processes.together():
    if jax.process_index():
      writer = make(missing=missing)
  return writer


def fill(
  writer: StoreWriter, source: source_lib.Source, preempted: program.Preemption
) -> None:
  """Writes this process's share of what is missing, in step with the others."""
  me, count = jax.process_index(), jax.process_count()
  todo = writer.missing_buffers()
  # However many there are, and were: each takes its turn of what is missing.
  shares = [todo[p::count] for p in range(count)]
  there = writer.rows_of(np.flatnonzero(~writer.missing))
  with tqdm.tqdm(
    total=writer.rows, initial=there, unit='tokens', unit_scale=True,
    mininterval=1.0, disable=me > 0,
  ) as bar:  # fmt: skip

    def show():
      # Of the others it is known only that they are about as far.
      bar.update(min(there + writer.rows_written * count, writer.rows) - bar.n)
      used = bar.n * writer.row_bytes / 1e9
      bar.set_postfix_str(
        f'{used:.3g} of {writer.rows * writer.row_bytes / 1e9:.3g} GB',
        refresh=False,
      )

    def tick():
      show()
      preempted.check()

    for i in range(max(map(len, shares))):
      with processes.together():
        preempted.check()
        if i < len(shares[me]):
          buffer = shares[me][i]
          writer.put(buffer, source.buffer(buffer, writer.encodings, tick))
    with processes.together():
      writer.flush()
    show()
  with processes.together():
    if me == 0:
      writer.finish()


def main(given: flags.FlagValues) -> int:
  processes.initialize(given)
  preempted = program.Preemption()
  with processes.together():
    config = config_lib.parse(program.read_config(given))
    source, identity, provenance = source_lib.open_source(
      lm=dataclasses.asdict(config.lm),
      text=dataclasses.asdict(config.text),
      store=dataclasses.asdict(config.store),
      sites=config.sites,
      seed=config.seed,
      devices=jax.local_devices(),
      model=config.mesh.model,
      tick=preempted.check,
    )
  with (
    contextlib.closing(source),
    open_writer(given.store, config, source, identity, provenance) as writer,
  ):
    fill(writer, source, preempted)
  if jax.process_index() == 0:
    print(f'{writer.rows} rows of {", ".join(config.sites)} in {given.store}')
  return 0


COMMAND = program.Command(define_flags, main)

if __name__ == '__main__':
  COMMAND.run()
