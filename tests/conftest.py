"""Four fake devices, set before the backend starts; no test touches a real one."""

import collections
import os
import tempfile

# XLA's CPU pool: collectives of fake devices deadlock when it is smaller than
# their number, which on few cores it is by default.
os.environ.setdefault('NPROC', '16')

import jax  # noqa: E402

# Programs are compiled once: tests share most of them. All commands that are started
# have a folder, in which one that is killed may leave half an entry, and this process
# has its own. Processes that share the tests inherit the first one's environment.
_COMPILED = tempfile.TemporaryDirectory(prefix='gsae-compiled-')
if 'PYTEST_XDIST_WORKER' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = f'{_COMPILED.name}/commands'
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
jax.config.update('jax_compilation_cache_dir', f'{_COMPILED.name}/here')
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)

import pathlib  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

from gsae_jax.lm import text  # noqa: E402
from gsae_jax.lm.layouts import make_layout  # noqa: E402
from gsae_jax.lm.weights import load_language_model  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT.parent / 'shared' / 'data'


def pytest_configure(config):
  del config
  flags.FLAGS.mark_as_parsed()


def pytest_collection_modifyitems(items):
  """Files with most slow tests first: none is left to one process at the end."""
  slow = collections.Counter(
    i.path for i in items if i.get_closest_marker('slow')
  )
  items.sort(key=lambda i: -slow[i.path])


@pytest.fixture(scope='session')
def embedded():
  return load_language_model('embedded', revision=None, dtype='float32')


def layout_of(lm, kind='replicated', *, model=1, devices=None):
  """The model on so many of the fake devices; all, if it is not said."""
  devices = jax.local_devices()[:devices]
  return make_layout(kind, lm.module.config, lm.bytes, devices, model)


def held_out_contexts(lm, *, documents, rows, characters=None, **changes):
  """Contexts of the beginnings of held-out documents of the standard library."""
  settings = {
    'context_length': 32,
    'packing': 'stream',
    'prepend_bos': True,
    'special_tokens': 'drop',
  }
  texts = text.split(text.read_documents('stdlib', None), 0.1, 'held_out')
  return text.pack(
    [t[:characters] for t in texts[:documents]],
    lm.tokenizer,
    rows=rows,
    **settings | changes,
  )


@pytest.fixture(scope='session')
def stories():
  """The folder of a real Llama model, and real text for it."""
  if not (SHARED / 'stories260k').is_dir():
    pytest.skip(f'no real model at {SHARED}/stories260k')
  return (
    SHARED / 'stories260k' / 'hf',
    SHARED / 'tinystories-text' / 'tinystories_a.txt',
  )


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture
def x64():
  """Float64 stays what it is."""
  jax.config.update('jax_enable_x64', True)
  yield
  jax.config.update('jax_enable_x64', False)


@pytest.fixture(scope='session')
def smoke(tmp_path_factory):
  """The four commands, run once; a store and a workdir."""
  from tests.commands import run

  folder = tmp_path_factory.mktemp('smoke')
  store, workdir = folder / 'store', folder / 'run'
  run('harvest', f'--store={store}')
  run('train', f'--store={store}', f'--workdir={workdir}')
  table = run('evaluate', f'--workdir={workdir}')
  printed = run('report', f'--workdir={workdir}')
  return store, workdir, table, printed
