"""A store of a thousand rows whose every value is known."""

import shutil

import ml_dtypes
import numpy as np

from gsae_jax.activations.layout import Encoding
from gsae_jax.activations.writer import StoreWriter
from tests.support.commands import files

ROWS, SHARD, CHUNK, WIDTH = 1000, 256, 32, 8


SITES = 'mlp_out.0', 'resid_post.1'


SHARDS = 4


def writer(path, *, centred=False, **changes):
  encodings = dict.fromkeys(SITES)
  if centred:
    mean_D = np.linspace(-40, 40, WIDTH).astype(np.float32)
    encodings = dict.fromkeys(SITES, Encoding(mean_D, np.float32(0.5)))
  values = {
    'identity': {'lm': {'weights': 'abc'}, 'seed': 0},
    'provenance': {'lm_path': 'x'},
    'widths': dict.fromkeys(SITES, WIDTH),
    'rows': ROWS,
    'shard_rows': SHARD,
    'chunk_rows': CHUNK,
    'buffer_rows': SHARD,
    'dtype': 'bfloat16',
    'make_encodings': lambda: encodings,
  }
  return StoreWriter(str(path), **values | changes)


def make_rows(start, stop, salt=0):
  """Rows of the whole store, as they are stored."""
  numbers = np.arange(start, stop)
  rng = np.random.default_rng(salt)
  x = rng.normal(size=(ROWS, WIDTH)).astype(ml_dtypes.bfloat16)[start:stop]
  return {
    'token_ids': numbers.astype(np.int32),
    'positions': (numbers % 7).astype(np.int32),
    'context_ids': (numbers // 7).astype(np.int32),
    'document_ids': (numbers // 50).astype(np.uint64) + np.uint64(2**63),
    'special': numbers % 5 == 0,
    'mlp_out.0': x,
    'resid_post.1': -x,
  }


def put(w, buffer, buffer_rows=SHARD, salt=0):
  start = buffer * buffer_rows
  w.put(buffer, make_rows(start, min(start + buffer_rows, ROWS), salt))


def fill(path, *, salt=0, **changes):
  """Writes what is missing; returns the buffers that it made."""
  with writer(path, **changes) as w:
    made = w.missing_buffers()
    for buffer in made:
      put(w, buffer, changes.get('buffer_rows', SHARD), salt)
    w.flush()
    w.finish()
  return made


def damage_missing(path, whole):
  (path / 'mlp_out.0/activations/c/2/0').unlink()


def damage_truncated(path, whole):
  file = path / 'mlp_out.0/activations/c/2/0'
  file.write_bytes(file.read_bytes()[:-100])


def damage_emptied(path, whole):
  (path / 'token_ids/c/2').write_bytes(b'')


def damage_foreign_rows(path, whole):
  shutil.copy(path / 'foreign/mlp_out.0/activations/c/2/0',
              path / 'mlp_out.0/activations/c/2/0')  # fmt: skip


def damage_foreign_shard(path, whole):
  for file in files(path / 'foreign'):
    if '/c/2' in file or file == 'records/2.json':
      shutil.copy(path / 'foreign' / file, path / file)


def damage_swapped(path, whole):
  for file in ('mlp_out.0/activations/c/{}/0', 'records/{}.json'):
    shutil.copy(path / file.format(1), path / file.format(2))


def damage_record(path, whole):
  file = path / 'records/2.json'
  file.write_bytes(file.read_bytes()[:-30])


DAMAGES = [
  damage_missing, damage_truncated, damage_emptied, damage_foreign_rows,
  damage_foreign_shard, damage_swapped, damage_record,
]  # fmt: skip
