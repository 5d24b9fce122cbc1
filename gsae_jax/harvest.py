r"""Fills an activation store from a language model.

  python -m gsae_jax.harvest --config=experiments/quickstart.py --store=DIR

Started again, it skips the shards that are there. Exits 42 when preempted.
"""

import dataclasses

import jax
import tqdm
from absl import flags

from gsae_jax import config as config_lib
from gsae_jax import program
from gsae_jax.activations.source import ShardSource
from gsae_jax.activations.writer import StoreWriter
from gsae_jax.errors import UserError
from gsae_jax.lm import text as text_lib
from gsae_jax.lm.weights import LanguageModel, load_language_model
from gsae_jax.mesh import make_mesh

_CONFIG = program.define_config()
_STORE = flags.DEFINE_string(
  'store', None, 'Where to write: a folder, gs:// or s3://.'
)
flags.mark_flags_as_required(['config', 'store'])


def store_identity(
  config: config_lib.Config, lm: LanguageModel, documents: text_lib.Documents
) -> dict:
  """Everything that determines a store's content, as plain data."""
  text = dataclasses.asdict(config.text)
  del text['path']  # The documents say it better.
  store = dataclasses.asdict(config.store)
  del store['batch_contexts']
  return config_lib.plain(
    {
      'lm': lm.identity,
      'text': text | {'documents': documents.digest},
      'sites': config.sites,
      'store': store,
      'seed': config.seed,
    }
  )


def main() -> int:
  config = config_lib.parse(program.read_config(_CONFIG))
  preempted = program.Preemption()
  mesh = make_mesh(-1, 1)
  if config.store.batch_contexts % jax.device_count():
    raise UserError(
      f'store.batch_contexts: {config.store.batch_contexts} is not divisible '
      f'by {jax.device_count()} devices'
    )
  lm = load_language_model(**dataclasses.asdict(config.lm))
  widths = {s: lm.module.config.check_site(s) for s in config.sites}
  lm.check_context_length(config.text.context_length)
  documents, contexts = text_lib.prepare(
    dataclasses.asdict(config.text),
    lm.tokenizer,
    part='train',
    rows=config.store.tokens,
  )
  writer = StoreWriter(
    _STORE.value,
    identity=store_identity(config, lm, documents),
    provenance={
      'lm_path': config.lm.path,
      'lm_revision': config.lm.revision,
      'text_path': config.text.path,
    },
    widths=widths,
    rows=config.store.tokens,
    shard_rows=config.store.shard_rows,
    chunk_rows=config.store.chunk_rows,
    dtype=config.store.dtype,
  )
  source = ShardSource(
    lm,
    contexts,
    sites=config.sites,
    rows=config.store.tokens,
    shard_rows=config.store.shard_rows,
    batch_contexts=config.store.batch_contexts,
    dtype=config.store.dtype,
    seed=config.seed,
    mesh=mesh,
  )
  with tqdm.tqdm(total=writer.rows, unit='tokens', unit_scale=True) as bar:
    for i, rows in enumerate(writer.run(source)):
      if i == 0:
        bar.initial = rows
      bar.update(rows)
      if preempted and bar.n < writer.rows:
        return program.PREEMPTED
  print(f'{writer.rows} rows of {", ".join(widths)} in {_STORE.value}')
  return 0


if __name__ == '__main__':
  program.run(main)
