"""Four fake devices, set before the backend starts; no test touches a real one."""

import json
import os
import shutil
import signal

# XLA's CPU pool: collectives of fake devices deadlock when it is smaller than
# their number, which on few cores it is by default.
os.environ.setdefault('NPROC', '16')

import jax  # noqa: E402

from tests.support.compilation import cache_folder  # noqa: E402

# Most tests share their programs with others, with the processes that they start
# and with the next run. No result depends on the cache.
_CACHE = {
  'jax_compilation_cache_dir': str(cache_folder()),
  'jax_persistent_cache_min_compile_time_secs': 0,
  'jax_persistent_cache_min_entry_size_bytes': -1,
}
for _name, _value in _CACHE.items():
  os.environ[_name.upper()] = str(_value)
  jax.config.update(_name, _value)

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)

# No array gets an axis or a dtype that the code does not state: implicit promotion
# turns a forgotten axis, or a float32 bias in a bfloat16 model, into a result. Both
# hold for the whole process, because Flax, Orbax and the parts of optax that the
# library calls comply; a test that calls more of optax relaxes them for that call.
# Child processes run without them, as users do.
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')

import filelock  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

from gsae_jax.lm.weights import load_language_model  # noqa: E402
from tests.support import commands  # noqa: E402
from tests.support.locations import SHARED  # noqa: E402
from tests.timing.table import read_seconds  # noqa: E402

pytest_plugins = ('tests.campaigns.plugin',)


def pytest_configure(config):
  del config
  flags.FLAGS.mark_as_parsed()


def pytest_collection_modifyitems(config, items):
  """The longest files first, so that no process has one left at the end."""
  if config.pluginmanager.hasplugin('randomly'):
    return
  seconds = read_seconds()
  items.sort(key=lambda item: -seconds.get(item.nodeid.partition('::')[0], 0))


def pytest_sessionfinish():
  commands.close_servers()


@pytest.fixture(autouse=True)
def signals():
  """Commands note signals; the next test finds the usual handlers."""
  numbers = signal.SIGTERM, signal.SIGINT
  before = [signal.getsignal(n) for n in numbers]
  yield
  for number, handler in zip(numbers, before, strict=True):
    signal.signal(number, handler)


@pytest.fixture(scope='session')
def embedded():
  return load_language_model('embedded', revision=None, dtype='float32')


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
def shared_folder(tmp_path_factory):
  """A folder that all processes of this test run have."""
  base = tmp_path_factory.getbasetemp()
  return base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base


@pytest.fixture(scope='session')
def smoke(shared_folder):
  """What the four commands leave, on one device, made once in a test run.

  Returns:
    the store, the workdir, and what evaluate and report printed. No test may
    change them: one that does copies them first.
  """
  folder = shared_folder / 'smoke'
  store, workdir, printed = folder / 'store', folder / 'run', folder / 'printed'
  with filelock.FileLock(shared_folder / 'smoke.lock'):
    if not printed.exists():
      shutil.rmtree(folder, ignore_errors=True)
      commands.run('harvest', f'--store={store}')
      commands.run('train', f'--store={store}', f'--workdir={workdir}')
      table = commands.run('evaluate', f'--workdir={workdir}')
      report = commands.run('report', f'--workdir={workdir}')
      printed.write_text(json.dumps([table, report]))
  before = commands.files(folder)
  yield store, workdir, *json.loads(printed.read_text())
  assert commands.files(folder) == before, 'a test changed what others read'
