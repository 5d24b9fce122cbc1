"""Harvest and train are killed many times, and all is as if they never were.

A trial is a chain: a run is killed several times, each time started again, and
in the end left to finish. Moments are drawn as events that can be seen in the
run's folder, so that they fall into the same parts of a run on any machine.
"""

import signal
import time

import pytest

from tests.campaigns import runs
from tests.support.commands import files, run, start, start_both

# 50 kills of harvest and 20 of training in all.
HARVEST_CHAINS, TRAIN_CHAINS = 10, 5
MOST_KILLS = 9  # Of one chain.

SITES = 'mlp_out.0', 'mlp_hidden.0'
# 256 shards, of which a chain's kills see less than half.
HARVEST = '--config.store.tokens=131072'
TRAIN = (
  '--config.train.steps=800',
  '--config.train.checkpoint_every=25',
  '--config.train.checkpoints_kept=3',
  '--config.train.log_every=10',
  '--config.train.histogram_every=100',
  '--config.train.resample_steps=(200,)',
  '--config.train.dead_after=50',
  '--config.train.resample_rows=256',
  '--config.loader.source=memory',
)
TWO_SAES = 'tests/configs/two_saes.py'


def kill(processes):
  for p in processes:
    p.send_signal(signal.SIGKILL)
  for p in processes:
    _, err = p.communicate()
    assert p.returncode == -signal.SIGKILL, err  # Neither done nor failed.


def run_and_time(moment, program, *flags, **kwargs):
  """Runs a command; returns the seconds from its start to a moment."""
  begun = time.monotonic()
  process = start(program, *flags, **kwargs)
  with runs.none_left([process]):
    runs.await_moment(moment, [process])
    seconds = time.monotonic() - begun
    _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  return seconds


@pytest.fixture(scope='module')
def whole_store(tmp_path_factory):
  """A store that nobody interrupted, and the seconds until its first file."""
  folder = tmp_path_factory.mktemp('whole') / 'store'
  seconds = run_and_time(
    (folder / 'manifest.json').exists, 'harvest', f'--store={folder}', HARVEST
  )
  return folder, seconds


def harvest_moment(kind, rng, store, startup):
  """A drawn moment of a harvest that is about to start."""
  finished = len(runs.names(store / 'records'))
  before = runs.unfinished_shards(store, SITES)
  more = int(rng.integers(1, 16))
  if kind == 'start':
    return runs.after(rng.uniform(0, startup))
  if kind == 'record':
    return lambda: len(runs.names(store / 'records')) >= finished + more
  assert kind == 'write'
  return lambda: (
    len(runs.names(store / 'records')) >= finished + more - 1
    and runs.unfinished_shards(store, SITES) - before
  )


@pytest.mark.campaign(HARVEST_CHAINS)
def test_a_harvest_killed_many_times_is_as_if_never_killed(
  trial, whole_store, tmp_path
):
  whole, startup = whole_store
  rng = trial.rng()
  flags = f'--store={tmp_path}', HARVEST
  kinds = [*rng.permutation(['start', 'write', 'write', 'write', 'record'])]
  of_both = rng.integers(len(kinds))  # One kill is of two processes.
  in_writes = 0
  for i, kind in enumerate(kinds):
    before = runs.unfinished_shards(tmp_path, SITES)
    moment = harvest_moment(kind, rng, tmp_path, startup)
    if i == of_both:
      processes = start_both(*flags, kill=True)
    else:
      processes = [start('harvest', *flags, kill=True)]
    with runs.none_left(processes):
      runs.await_moment(moment, processes)
      kill(processes)
    in_writes += bool(runs.unfinished_shards(tmp_path, SITES) - before)
    if i + 1 == len(kinds) < MOST_KILLS and not in_writes:
      kinds.append('write')  # The writes ended before the signals came.
  print(f'{len(kinds)} kills, {in_writes} of them in the middle of a shard')
  assert in_writes
  run('harvest', *flags)
  assert files(tmp_path) == files(whole)
  assert '0 bad files' in run('store', 'verify', str(tmp_path))


@pytest.fixture(scope='module')
def whole_training(smoke, tmp_path_factory):
  """A workdir that nobody interrupted, and the seconds until its checkpoint."""
  folder = tmp_path_factory.mktemp('whole') / 'run'
  flags = f'--store={smoke[0]}', f'--workdir={folder}', *TRAIN
  seconds = run_and_time(
    lambda: runs.finished_checkpoint(folder) >= 0,
    'train',
    *flags,
    config=TWO_SAES,
  )
  return folder, seconds


def train_moment(kind, rng, workdir, startup):
  """A drawn moment of a training run that is about to start."""
  done = runs.finished_checkpoint(workdir)
  more = int(rng.integers(1, 100))
  if kind == 'start':
    return runs.after(rng.uniform(0, startup))
  if kind == 'step':
    return lambda: runs.logged_step(workdir) >= done + more
  assert kind == 'save'
  return lambda: (
    runs.finished_checkpoint(workdir) >= done + 1 + more // 2
    and runs.is_saving(workdir)
  )


@pytest.mark.campaign(TRAIN_CHAINS)
def test_a_training_killed_many_times_is_as_if_never_killed(
  trial, smoke, whole_training, tmp_path
):
  whole, startup = whole_training
  rng = trial.rng()
  flags = f'--store={smoke[0]}', f'--workdir={tmp_path}', *TRAIN
  kinds = [*rng.permutation(['start', 'save', 'save', 'step'])]
  in_saves = 0
  for i, kind in enumerate(kinds):
    moment = train_moment(kind, rng, tmp_path, startup)
    process = start('train', *flags, config=TWO_SAES, kill=True)
    with runs.none_left([process]):
      runs.await_moment(moment, [process])
      kill([process])
    in_saves += runs.is_saving(tmp_path)
    if i + 1 == len(kinds) < MOST_KILLS and not in_saves:
      kinds.append('save')  # The saves ended before the signals came.
  print(f'{len(kinds)} kills, {in_saves} while a checkpoint was written')
  assert in_saves
  run('train', *flags, config=TWO_SAES)
  runs.assert_equal_training(tmp_path, whole)
