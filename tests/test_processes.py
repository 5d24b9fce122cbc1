"""Two processes of two devices: the rows, batches and exit codes of one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import gsae_jax
from gsae_jax import processes
from gsae_jax.activations.loader import Loader
from gsae_jax.activations.store import open_store
from gsae_jax.errors import UserError
from tests.support.commands import (
  files,
  finish,
  free_port,
  metrics_of,
  refuse,
  run,
  start,
  start_both,
  wait_for,
)
from tests.support.locations import ROOT

pytestmark = pytest.mark.integration


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


@pytest.mark.slow
def test_windows_of_text_begun_by_one_and_finished_by_two(tmp_path):
  flags = '--config.text.window=8', '--config.text.order=source'
  run('harvest', f'--store={tmp_path}/whole', *flags)
  flags = f'--store={tmp_path}/killed', *flags
  process = start('harvest', *flags, kill=True)
  records = tmp_path / 'killed' / 'records'
  wait_for(lambda: len(list(records.glob('*.json'))) >= 3, process)
  process.kill()
  process.communicate()
  missing = 8 - len(list(records.glob('*.json')))
  codes, outputs = finish(start_both(*flags))
  assert codes == [0, 0] and missing > 1, outputs
  assert files(tmp_path / 'killed') == files(tmp_path / 'whole')


def test_two_processes_evaluate_as_one(smoke, tmp_path):
  _, workdir, table, _ = smoke
  mine = tmp_path / 'run'
  shutil.copytree(workdir, mine, ignore=shutil.ignore_patterns('eval'))
  # More contexts than smoke has in a batch, so that both have some to do.
  flags = f'--workdir={mine}', '--config.eval.batch_size=4'
  codes, outputs = finish(start_both(*flags, program='evaluate'))
  assert codes == [0, 0], outputs
  assert 'loss recovered' in outputs[0][0]
  assert 'loss recovered' not in outputs[1][0]
  wanted = sorted(p.relative_to(workdir) for p in (workdir / 'eval').rglob('*'))
  assert wanted == sorted(
    p.relative_to(mine) for p in (mine / 'eval').rglob('*')
  )
  for name in [p for p in wanted if p.suffix == '.json']:
    mine_, whole = (json.loads((f / name).read_text()) for f in (mine, workdir))
    for got, want in zip(mine_, whole, strict=True):
      assert got.keys() == want.keys()
      for field, value in want.items():
        if isinstance(value, float):
          np.testing.assert_allclose(got[field], value, rtol=1e-5)
        elif field not in ('density', 'intervals'):
          assert got[field] == value
  for name in [p for p in wanted if p.suffix == '.safetensors']:
    got, want = (load_file(f / name) for f in (mine, workdir))
    for field, value in want.items():
      near = np.isclose(got[field], value, rtol=1e-4, atol=1e-4)
      # Features that tie to rounding may change places.
      assert near.mean() > 0.99, (name, field)
  both = start_both(*flags, '--watch', program='evaluate')
  codes, outputs = finish(both)
  assert codes == [0, 0], outputs


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
  both = start_both(*flags, kill=True)
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


TWO = 'tests/configs/two_saes.py'
# The paper's learning rate: what rounding does to a step is in proportion to it.
TRAIN = (
  '--config.train.steps=60', '--config.train.checkpoint_every=20',
  '--config.train.log_every=5', '--config.train.learning_rate=3e-4',
)  # fmt: skip
RESAMPLE = (
  '--config.train.dead_after=4', '--config.train.resample_steps=(30,)',
  '--config.train.resample_rows=256', '--config.train.learning_rate=0.02',
)  # fmt: skip


@pytest.fixture(scope='module')
def alone(smoke, tmp_path_factory):
  """What one process with four devices trains."""
  workdir = tmp_path_factory.mktemp('alone')
  flags = (f'--store={smoke[0]}', f'--workdir={workdir}', *TRAIN)
  run('train', *flags, devices=4, config=TWO)
  return workdir


def equal_runs(ours, theirs, tolerance):
  """Parameters at the end, and what was logged of them."""
  for name in ('gated_mlp_out.0', 'relu_mlp_hidden.0'):
    a, b = (gsae_jax.load(str(w), member=name) for w in (ours, theirs))
    assert a.metadata['step'] == b.metadata['step'] == 60
    for k, v in b.params.items():
      np.testing.assert_allclose(a.params[k], v, atol=tolerance)
  a, b = metrics_of(ours), metrics_of(theirs)
  key = lambda r: (r['step'], r['member'], 'resampled' in r, 'density' in r)
  assert [*map(key, a)] == [*map(key, b)]
  for x, y in zip(a, b, strict=True):
    for name in ('resampled', 'loss'):
      if name in y:
        np.testing.assert_allclose(x[name], y[name], rtol=1e-4)


@pytest.mark.parametrize(
  ('mesh', 'sparse'),
  [
    pytest.param((4, 1), 'auto', marks=pytest.mark.slow),
    ((1, 4), 'auto'),
    pytest.param((2, 2), 'always', marks=pytest.mark.slow),
  ],
)
def test_two_processes_train_what_one_does(
  smoke, alone, tmp_path, mesh, sparse
):
  flags = [f'--config.mesh.{k}={n}' for k, n in zip(
    ('data', 'model'), mesh, strict=True
  )]  # fmt: skip
  if sparse == 'always':
    flags += ['--config.train.sparse=always', '--config.train.members=looped']
  flags += [f'--store={smoke[0]}', f'--workdir={tmp_path}', *TRAIN]
  codes, outputs = finish(start_both(*flags, program='train', config=TWO))
  assert codes == [0, 0], outputs
  assert 'step 60 of 60, 2 SAEs' in outputs[0][0]
  assert '2 SAEs' not in outputs[1][0]
  equal_runs(tmp_path, alone, 1e-6)
  taken = {r['sparse_step'] for r in metrics_of(tmp_path) if 'sparse_step' in r}
  assert (taken == {1.0}) == (sparse == 'always'), taken


@pytest.mark.slow
def test_two_processes_resample_what_one_does(smoke, tmp_path):
  flags = (f'--store={smoke[0]}', *TRAIN, *RESAMPLE)
  run('train', f'--workdir={tmp_path}/one', *flags, devices=4, config=TWO)
  codes, outputs = finish(
    start_both(
      f'--workdir={tmp_path}/two', '--config.mesh.data=2',
      '--config.mesh.model=2', *flags, program='train',
      config=TWO,
    )
  )  # fmt: skip
  assert codes == [0, 0], outputs
  assert any(r.get('resampled') for r in metrics_of(tmp_path / 'two'))
  equal_runs(tmp_path / 'two', tmp_path / 'one', 1e-4)


@pytest.mark.slow
def test_training_moves_between_numbers_of_processes(smoke, alone, tmp_path):
  # A signal to one of two stops both, at the same step; one process goes on,
  # and two end it.
  store, *_ = smoke
  flags = (f'--store={store}', f'--workdir={tmp_path}', *TRAIN)
  metrics = tmp_path / 'metrics.jsonl'
  both = start_both(*flags, program='train', config=TWO)
  wait_for(lambda: metrics.exists() and metrics.read_text(), both[0])
  both[1].send_signal(signal.SIGTERM)
  codes, outputs = finish(both)
  assert codes == [42, 42], outputs
  steps = lambda: {int(p.name) for p in (tmp_path / 'checkpoints').iterdir()}
  stopped_at = max(steps())
  assert 0 < stopped_at < 60
  one = start('train', *flags, devices=2, config=TWO)
  enough = f'"step": {min(stopped_at + 6, 55) // 5 * 5},'
  wait_for(lambda: enough in metrics.read_text(), one)
  one.send_signal(signal.SIGTERM)
  assert one.wait(timeout=300) == 42
  one.communicate()
  assert 60 > max(steps()) > stopped_at
  codes, outputs = finish(start_both(*flags, program='train', config=TWO))
  assert codes == [0, 0], outputs
  equal_runs(tmp_path, alone, 1e-6)


@pytest.mark.slow
def test_a_mistake_on_one_process_ends_the_training_of_both(smoke, tmp_path):
  # Only process 0 reads what was logged.
  (tmp_path / 'metrics.jsonl').write_text('nonsense\n{}\n')
  both = start_both(
    f'--store={smoke[0]}',
    f'--workdir={tmp_path}',
    *TRAIN,
    program='train',
    config=TWO,
  )
  codes, outputs = finish(both)
  assert codes == [1, 1], outputs
  assert 'error: --workdir: line 1 of' in outputs[0][1]
  assert 'error: another process failed' in outputs[1][1]
  assert not any('Traceback' in err for _, err in outputs)


@pytest.mark.slow
def test_a_killed_process_ends_the_training_of_the_other(
  smoke, alone, tmp_path
):
  flags = (f'--store={smoke[0]}', f'--workdir={tmp_path}', *TRAIN)
  metrics = tmp_path / 'metrics.jsonl'
  both = start_both(*flags, program='train', config=TWO, kill=True)
  wait_for(lambda: metrics.exists() and metrics.read_text(), both[0])
  both[1].kill()
  codes, outputs = finish(both)
  # A collective fails, or waits until JAX gives up on the other and aborts.
  assert codes[0] and codes[1] == -signal.SIGKILL
  if codes[0] == 42:
    assert 'error: another process is gone' in outputs[0][1]
    assert 'Traceback' not in outputs[0][1]
  run('train', *flags, devices=4, config=TWO)
  equal_runs(tmp_path, alone, 1e-6)


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
    pytest.param(
      {'batch_size': 128, 'unit': 'shard', 'shuffle_rows': 2048},
      marks=pytest.mark.slow,
    ),
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


@pytest.mark.parametrize(
  'error, code',
  [
    (jax.errors.JaxRuntimeError('DEADLINE_EXCEEDED: Barrier timed out'), 42),
    (RuntimeError('UNAVAILABLE: failed to connect\nmore'), 42),
    (RuntimeError('distributed.initialize should only be called once'), 1),
    (ValueError('coordinator_address should be defined'), 1),
  ],
)
def test_others_that_do_not_come_in_time(monkeypatch, capsys, error, code):
  def fail(**unused):
    raise error

  monkeypatch.setattr(jax.distributed, 'initialize', fail)
  given = SimpleNamespace(coordinator='auto', processes=None, process=None)
  monkeypatch.setattr(os, '_exit', sys.exit)
  with pytest.raises(SystemExit if code == 42 else UserError) as left:
    processes.initialize(given)
  if code == 42:
    assert left.value.code == 42
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and 'same command goes on' in said
