"""Runs in processes of this machine: stopped by a signal, and taken up again."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import gsae_jax
from tests.commands import start, wait_for
from tests.conftest import ROOT
from tests.test_processes import free_port

CONFIG = 'tests/configs/one_sae.py'


def steps(workdir):
  return sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir())


def test_one_process_that_was_initialised_saves_its_step(smoke, tmp_path):
  place = f'--coordinator=127.0.0.1:{free_port()}'
  process = start(
    'train', f'--store={smoke[0]}', f'--workdir={tmp_path}', place,
    '--processes=1', '--process=0', config=CONFIG,
  )  # fmt: skip
  metrics = tmp_path / 'metrics.jsonl'
  wait_for(lambda: metrics.exists() and metrics.read_text(), process)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 42, err
  first, saved = steps(tmp_path)
  assert first == 0 and 0 < saved < 300
  assert f'step {saved} of 400' in out


PREEMPTION = """
import os, signal
from gsae_jax.program import Preemption
seen = Preemption()
for _ in range(3):
  os.kill(os.getpid(), signal.SIGTERM)
print(bool(seen), flush=True)
os.kill(os.getpid(), signal.SIGINT)
print('not reached')
"""


def test_a_machine_that_goes_down_sends_more_than_one_signal():
  done = subprocess.run(
    [sys.executable, '-c', PREEMPTION], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout == 'True\n'
  assert done.returncode == -signal.SIGINT


END = """
import signal, sys
from gsae_jax import program
sys.argv = ['x']
seen = program.Preemption()
try:
  program.run(lambda: 42)
except SystemExit as e:
  print(e.code, signal.getsignal(signal.SIGTERM).name)
"""


def test_a_signal_after_the_end_does_not_change_the_code():
  done = subprocess.run(
    [sys.executable, '-c', END], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout == '42 SIG_IGN\n', done.stderr


def local(verb, run, *flags):
  return subprocess.Popen(
    [sys.executable, '-m', 'launch', 'local', verb, f'--run={run}', *flags],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )


def submit(store, run, *changes, hosts=2):
  flags = f'--config={CONFIG}', f'--store={store}', '--steps=train'
  shape = f'--processes={hosts}', f'--devices={hosts}'
  return local('submit', run, *flags, *shape, *changes)


@pytest.mark.slow
def test_two_hosts_stopped_by_a_signal_to_one_and_taken_up_again(
  smoke, tmp_path
):
  whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
  process = submit(smoke[0], whole)
  said, _ = process.communicate(timeout=300)
  assert process.returncode == 0, said
  process = submit(smoke[0], stopped)
  metrics = stopped / 'metrics.jsonl'
  wait_for(lambda: metrics.exists() and metrics.read_text(), process)
  pids = json.loads((stopped / 'launch.json').read_text())['pids']
  os.kill(pids[1], signal.SIGTERM)
  sent = time.monotonic()
  said, _ = process.communicate(timeout=300)
  print(f'{time.monotonic() - sent:.1f} s from the signal to the exit')
  assert process.returncode == 42, said
  assert 'worker 0-1: SIGTERM came; saving' in said
  for host in (0, 1):
    assert f'worker 0-{host}: train ended with 42' in said
  first, saved = steps(stopped)
  assert first == 0 and 0 < saved < 400 and f'step {saved} of 400' in said
  said, _ = local('status', stopped).communicate(timeout=60)
  assert 'processes: none' in said and 'trainer: preempted at train' in said
  process = submit(smoke[0], stopped)
  said, _ = process.communicate(timeout=300)
  assert process.returncode == 0, said
  ours, theirs = (gsae_jax.load(str(w)) for w in (stopped, whole))
  assert ours.metadata['step'] == theirs.metadata['step'] == 400
  for name, value in theirs.params.items():
    np.testing.assert_array_equal(ours.params[name], value)
  said, _ = local('logs', stopped, '--host=0-0').communicate(timeout=60)
  assert 'step 400 of 400' in said


@pytest.mark.slow
def test_a_run_is_started_from_any_folder_of_the_clone(tmp_path):
  code = """
import os, sys
os.chdir('experiments')
from launch.__main__ import main
main(['launch', 'local', 'submit', '--config=smoke.py', '--steps=evaluate', *sys.argv[1:]])
"""
  done = subprocess.run(
    [sys.executable, '-c', code, f'--run={tmp_path}'],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )
  # It read the config, and found that nothing was trained.
  assert done.returncode == 1 and 'no checkpoints at' in done.stdout, done


@pytest.mark.slow
def test_delete_stops_a_run_and_watch_sees_its_end(smoke, tmp_path):
  endless = '--config.train.steps=1000000'
  process = submit(smoke[0], tmp_path, endless, hosts=1)
  metrics = tmp_path / 'metrics.jsonl'
  wait_for(lambda: metrics.exists() and metrics.read_text(), process)
  again = submit(smoke[0], tmp_path, endless, hosts=1)
  assert 'is running (processes' in again.communicate(timeout=60)[0]
  watch = local('watch', tmp_path, '--poll_seconds=0.1')
  said, _ = local('delete', tmp_path).communicate(timeout=60)
  assert f'{tmp_path} is left as it is' in said
  assert process.wait(timeout=60) == 42
  process.communicate()
  watch.communicate(timeout=60)
  assert watch.returncode == 0
  assert steps(tmp_path)[-1] > 0
  said, _ = local('status', tmp_path).communicate(timeout=60)
  assert 'trainer: deleted' in said


@pytest.mark.slow
def test_the_step_of_a_worker_that_is_killed_saves_and_leaves(smoke, tmp_path):
  process = submit(smoke[0], tmp_path, '--config.train.steps=1000000', hosts=1)
  metrics = tmp_path / 'metrics.jsonl'
  wait_for(lambda: metrics.exists() and metrics.read_text(), process)
  (worker,) = json.loads((tmp_path / 'launch.json').read_text())['pids']
  os.kill(worker, signal.SIGKILL)
  said, _ = process.communicate(timeout=60)
  assert process.returncode == 42, said
  assert steps(tmp_path)[-1] > 0
  said, _ = local('status', tmp_path).communicate(timeout=60)
  assert 'processes: none' in said
