"""Harvest and train are killed many times, and all is as if they never were."""

import os
import signal
import time

import numpy as np
import pytest

import gsae_jax
from tests.commands import files, metrics_of, run, start, wait_for
from tests.test_processes import start_both

CONFIG = 'experiments/quickstart.py'
SETTINGS = (
  '--config.store.tokens=300000',
  '--config.store.shard_rows=1024',
  '--config.store.buffer_rows=4096',
)
KILLS = 24


def unfinished(store):
  """Files of shards that have no record, and locks of writes: when they change."""
  finished = {p.stem for p in store.glob('records/*.json')}
  parts = [*store.glob('*/activations/c/*/*'), *store.glob('*/c/*')]
  return {
    (str(p.relative_to(store)), p.stat().st_mtime_ns)
    for p in parts
    if p.is_file()
    and p.parts[p.parts.index('c') + 1].partition('.')[0] not in finished
  } | {(str(p), p.stat().st_mtime_ns) for p in store.rglob('*.__lock')}


def wait_for_a_new_shard(store, processes):
  folder = store / 'mlp_out.0/activations/c'
  count = lambda: len(os.listdir(folder)) if folder.exists() else 0
  before = count()
  while count() == before:
    assert all(p.poll() is None for p in processes), (
      'there was too little to do'
    )
    time.sleep(0.0005)


@pytest.mark.slow
def test_a_harvest_killed_many_times_is_as_if_never_killed(tmp_path):
  whole, store = tmp_path / 'whole', tmp_path / 'store'
  run('harvest', f'--store={whole}', *SETTINGS, config=CONFIG)

  rng = np.random.default_rng(0)
  flags = (f'--store={store}', *SETTINGS)
  in_writes, until_shard = 0, 0.0
  for kill in range(KILLS):
    before = unfinished(store)
    if kill == KILLS // 2:  # Once by two.
      processes = start_both(*flags, config=CONFIG)
    else:
      processes = [start('harvest', *flags, config=CONFIG)]
    begun = time.monotonic()
    if kill % 2:  # At any moment, the start included.
      time.sleep(rng.uniform(0, until_shard + 0.5))
    else:  # While shards are being written.
      wait_for_a_new_shard(store, processes)
      until_shard = time.monotonic() - begun
      time.sleep(rng.uniform(0, 0.01))
    for p in processes:
      p.send_signal(signal.SIGKILL)
    for p in processes:
      _, err = p.communicate()
      assert p.returncode == -signal.SIGKILL, err  # Nor done, nor failed.
    in_writes += bool(unfinished(store) - before)
  print(f'{KILLS} kills, {in_writes} of them in the middle of a shard')
  assert in_writes >= 6
  run('harvest', *flags, config=CONFIG)
  assert files(store) == files(whole)
  assert '0 bad files' in run('store', 'verify', str(store))


TRAIN = (
  '--config.train.steps=1200',
  '--config.train.checkpoint_every=50',
  '--config.train.checkpoints_kept=3',
  '--config.train.log_every=10',
  '--config.train.histogram_every=100',
  '--config.train.resample_steps=(400,)',
  '--config.train.dead_after=100',
  '--config.train.resample_rows=256',
  '--config.loader.source=memory',
)
TRAIN_KILLS = 12


@pytest.mark.slow
def test_a_training_killed_many_times_is_as_if_never_killed(smoke, tmp_path):
  store, *_ = smoke
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  run('train', f'--store={store}', f'--workdir={whole}', *TRAIN)
  folder = killed / 'checkpoints'
  names = lambda: set(os.listdir(folder)) if folder.exists() else set()
  finished = lambda: max((int(n) for n in names() if n.isdigit()), default=-1)
  saving = lambda: any('tmp' in n for n in names())
  rng = np.random.default_rng(0)
  in_saves = 0
  for kill in range(TRAIN_KILLS):
    before = finished()
    process = start('train', f'--store={store}', f'--workdir={killed}', *TRAIN)
    wait_for(lambda before=before: finished() > before, process)
    if (
      kill % 2
    ):  # At any moment behind a checkpoint; else while one is written.
      time.sleep(rng.uniform(0, 0.5))
    else:
      wait_for(saving, process)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    in_saves += saving()
  print(f'{TRAIN_KILLS} kills, {in_saves} while a checkpoint was written')
  assert in_saves >= 3 and finished() < 1200
  run('train', f'--store={store}', f'--workdir={killed}', *TRAIN)
  assert metrics_of(killed) == metrics_of(whole)
  for name in ('gated_mlp_out.0', 'relu_mlp_hidden.0'):
    a, b = (gsae_jax.load(str(w), member=name) for w in (killed, whole))
    assert a.metadata['step'] == b.metadata['step'] == 1200
    for k, v in b.params.items():
      np.testing.assert_array_equal(a.params[k], v)
