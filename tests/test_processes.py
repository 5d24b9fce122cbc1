"""Two processes of two devices: the rows, batches and exit codes of one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from gsae_jax.activations.loader import Loader
from gsae_jax.activations.store import open_store
from tests.commands import files, refuse, start
from tests.conftest import ROOT


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def start_both(*flags, own=((), ()), **kwargs):
  """Starts harvest in two processes; `own` are flags of each."""
  place = f'--coordinator=127.0.0.1:{free_port()}'
  return [
    start(
      'harvest', *flags, place, '--processes=2', f'--process={i}', *own[i],
      devices=2,
      **kwargs,
    )
    for i in range(2)
  ]  # fmt: skip


def finish(both):
  """Exit codes and what was printed."""
  outputs = [p.communicate(timeout=300) for p in both]
  return [p.returncode for p in both], outputs


def test_two_processes_write_the_store_of_one(smoke, tmp_path):
  store, *_ = smoke
  codes, outputs = finish(start_both(f'--store={tmp_path}'))
  assert codes == [0, 0], outputs
  assert files(tmp_path) == files(store)
  assert '4096 rows of' in outputs[0][0]
  assert '4096 rows of' not in outputs[1][0]


def test_preemption_of_one_stops_both_and_one_can_go_on(smoke, tmp_path):
  store, *_ = smoke
  both = start_both(f'--store={tmp_path}')
  while not (tmp_path / 'manifest.json').exists():
    assert both[0].poll() is None, both[0].communicate()
    time.sleep(0.01)
  both[1].send_signal(signal.SIGTERM)
  codes, outputs = finish(both)
  assert codes == [42, 42], outputs
  alone = start('harvest', f'--store={tmp_path}')
  assert alone.wait(timeout=300) == 0
  alone.communicate()
  assert files(tmp_path) == files(store)


def test_failure_of_one_ends_both(tmp_path):
  # One of them was given another config: two manifests for one place.
  codes, outputs = finish(
    start_both(f'--store={tmp_path}', own=((), ('--config.seed=1',)))
  )
  assert codes == [1, 1]
  assert 'error: another process failed' in outputs[0][1]
  assert 'holds another store (identity.seed is 0 there and 1' in outputs[1][1]
  assert not any('Traceback' in err for _, err in outputs)


def test_a_process_that_is_killed_ends_the_other_in_order(tmp_path):
  flags = (f'--store={tmp_path}', '--config.store.tokens=200000')
  both = start_both(*flags)
  while len(list((tmp_path / 'records').glob('*.json'))) < 4:
    assert both[0].poll() is None, both[0].communicate()
    time.sleep(0.01)
  both[1].kill()
  codes, outputs = finish(both)
  assert codes == [42, -signal.SIGKILL], outputs
  assert 'error: another process is gone' in outputs[0][1]
  assert 'Traceback' not in outputs[0][1]


def test_a_mistake_on_one_process_ends_both(tmp_path):
  codes, outputs = finish(
    start_both(f'--store={tmp_path}', own=((), ('--config.seed=-1',)))
  )
  assert codes == [1, 1], outputs
  assert 'error: config field seed: -1 is too small' in outputs[1][1]


def test_flags_that_do_not_fit(tmp_path):
  flag = f'--store={tmp_path}'
  refuse('harvest', flag, '--processes=2', match='need --coordinator')
  refuse(
    'harvest', flag, '--coordinator=here', '--processes=1', '--process=0',
    match="'here' is not HOST:PORT",
  )  # fmt: skip
  refuse(
    'harvest', flag, '--coordinator=auto', '--processes=1',
    match='--coordinator=auto finds',
  )  # fmt: skip
  refuse(
    'harvest', flag, '--coordinator=127.0.0.1:1', '--processes=2',
    '--process=2', match='--process=0 to N-1',
  )  # fmt: skip


WORKER = """
import itertools, json, os, sys
os.environ['NPROC'] = '16'
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 2)
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from gsae_jax.activations import loader as loader_lib
from gsae_jax.activations.loader import Loader, Pool
from gsae_jax.activations.store import open_store
store, out, port, me = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
jax.distributed.initialize(f'127.0.0.1:{port}', 2, me)
devices = np.array(jax.devices())
meshes = {
  'data': devices.reshape(4, 1),
  'data_first': devices.reshape(2, 2),
  'model_first': devices.reshape(2, 2).T,
  'model': devices.reshape(1, 4),
}
settings = json.loads(sys.argv[5])
for name, mesh in meshes.items():
  loader = Loader(open_store(store), ('mlp_out.0',), **settings)
  reads = []
  loader_lib.Pool = lambda r, u, s: reads.append(len(u)) or Pool(r, u, s)
  sharding = NamedSharding(Mesh(mesh, ('data', 'model')), P('data'))
  batches = itertools.islice(loader.batches(sharding, start=3), 40)
  found = {}
  for step, batch in enumerate(batches):
    for shard in batch['mlp_out.0'].addressable_shards:
      rows = range(settings['batch_size'])[shard.index[0]]
      found[f'{step}_{rows.start}_{rows.stop}'] = np.asarray(shard.data)
  np.savez(f'{out}/{name}_{me}.npz', reads=max(reads), **found)
"""


@pytest.mark.parametrize(
  'settings',
  [
    {'batch_size': 128, 'unit': 'chunk', 'shuffle_rows': 1024},
    {'batch_size': 128, 'unit': 'shard', 'shuffle_rows': 2048},
  ],
)
def test_two_processes_get_the_batches_of_one(smoke, tmp_path, settings):
  store, *_ = smoke
  settings = settings | {'seed': 7}
  port = str(free_port())
  workers = [
    subprocess.Popen(
      [sys.executable, '-c', WORKER, str(store), str(tmp_path), port, str(me),
       json.dumps(settings)],
      cwd=ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    )
    for me in range(2)
  ]  # fmt: skip
  assert [w.wait(timeout=300) for w in workers] == [0, 0]
  loader = Loader(open_store(str(store)), ('mlp_out.0',), **settings)
  want = [loader.rows_at(3 + i, 'mlp_out.0') for i in range(40)]
  units = settings['shuffle_rows'] // {'chunk': 16, 'shard': 512}[settings['unit']]  # fmt: skip
  for name, share in (
    ('data', 0.5), ('data_first', 0.5), ('model_first', 1), ('model', 1)
  ):  # fmt: skip
    seen = np.zeros((40, 128), bool)
    for me in range(2):
      with np.load(tmp_path / f'{name}_{me}.npz') as found:
        # A process reads what its devices hold, and no more.
        assert found['reads'] == share * units
        for key in set(found.files) - {'reads'}:
          step, first, last = map(int, key.split('_'))
          np.testing.assert_array_equal(found[key], want[step][first:last])
          seen[step, first:last] = True
    assert seen.all()
