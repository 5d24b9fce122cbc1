"""A small store of planted sparse codes, for training to be quick and real."""

import numpy as np
import pytest
import tensorstore as ts

from gsae_jax.activations.loader import Loader
from gsae_jax.activations.store import open_store
from gsae_jax.activations.writer import StoreWriter
from gsae_jax.config import MemberConfig, TrainConfig

WIDTH, ROWS = 16, 4096


def write_store(path, rows=ROWS, seed=0, dtype='float32'):
  rng = np.random.default_rng(seed)
  directions = rng.normal(size=(48, WIDTH))
  directions /= np.linalg.norm(directions, axis=1, keepdims=True)
  sites = 'resid_post.0', 'mlp_out.0'

  def make(shard):
    draw = np.random.default_rng((seed, shard))
    n = min(1024, rows - shard * 1024)
    codes = draw.exponential(size=(n, 48)) * (draw.random((n, 48)) < 0.08)
    x = (codes @ directions * 5 + 1).astype(np.float32)
    return {
      'token_ids': np.arange(n, dtype=np.int32),
      'positions': np.zeros(n, np.int32),
      'context_ids': np.zeros(n, np.int32),
      'document_ids': np.zeros(n, np.uint64),
      'special': np.zeros(n, bool),
      'resid_post.0': x.astype(ts.dtype(dtype).numpy_dtype),
      'mlp_out.0': (2 * x).astype(ts.dtype(dtype).numpy_dtype),
    }

  with StoreWriter(
    str(path),
    identity={'seed': seed},
    provenance={},
    widths=dict.fromkeys(sites, WIDTH),
    rows=rows,
    shard_rows=1024,
    chunk_rows=16,
    buffer_rows=1024,
    dtype=dtype,
    make_encodings=lambda: dict.fromkeys(sites),
  ) as writer:
    for shard in writer.missing_buffers():
      writer.put(shard, make(shard))
    writer.flush()
    writer.finish()
  return open_store(str(path))


def open_loader(store, members, train, *, seed=0):
  """What the train command opens, without mixing."""
  return Loader(
    store,
    tuple(dict.fromkeys(m.site for m in members)),
    batch_size=train.batch_size,
    seed=seed,
    unit='chunk',
    shuffle_rows=train.batch_size,
  )


@pytest.fixture(scope='session')
def store(tmp_path_factory):
  return write_store(tmp_path_factory.mktemp('store'))


def settings(**changes) -> TrainConfig:
  values = {
    'steps': 30,
    'batch_size': 128,
    'learning_rate': 3e-3,
    'warmup_steps': 5,
    'l1_warmup_steps': 5,
    'decay_steps': 0,
    'resample_steps': (),
    'resample_rows': 512,
    'dead_after': 10,
    'encoder_scale': 0.5,
    'normalize': 'mean_squared_norm',
    'loss_scale': 'sum',
    'checkpoint_every': 10,
    'checkpoints_kept': None,
    'log_every': 1,
    'writers': (),
  }
  return TrainConfig(**values | changes)


def member(name='a', **changes) -> MemberConfig:
  values = {
    'architecture': 'gated',
    'site': 'resid_post.0',
    'features': 64,
    'l1': 0.1,
  }
  return MemberConfig(name=name, **values | changes)
