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
from launch import local
from tests.support.commands import free_port, start, wait_for
from tests.support.locations import ROOT

pytestmark = pytest.mark.integration
CONFIG = 'tests/configs/one_sae.py'
# Of what two hosts train, which take ten times as long for a step.
SHORT = (
  '--config.train.steps=160', '--config.train.checkpoint_every=150',
  '--config.train.sparse=never',
)  # fmt: skip


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
  program.Command(lambda values: None, lambda given: 42).run()
except SystemExit as e:
  print(e.code, signal.getsignal(signal.SIGTERM).name)
"""


def test_a_signal_after_the_end_does_not_change_the_code():
  done = subprocess.run(
    [sys.executable, '-c', END], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout == '42 SIG_IGN\n', done.stderr


@pytest.fixture
def start_local():
  """Starts `launch local` in a process, which does not outlive the test."""
  processes = []

  def start_one(verb, *flags):
    process = subprocess.Popen(
      [sys.executable, '-m', 'launch', 'local', verb, *flags],
      cwd=ROOT,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )
    processes.append(process)
    return process

  yield start_one
  for process in processes:
    if process.poll() is None:
      process.terminate()  # It stops what it started.
      process.communicate(timeout=60)


def training(store, run, *changes, hosts=1):
  """Arguments of `submit` for training on hosts with as many devices each."""
  return (
    f'--run={run}', f'--config={CONFIG}', f'--store={store}', '--steps=train',
    f'--processes={hosts}', f'--devices={hosts}', *changes,
  )  # fmt: skip


def wait_for_steps(run, process):
  metrics = run / 'metrics.jsonl'
  wait_for(lambda: metrics.exists() and metrics.read_text(), process)


def test_two_hosts_stopped_by_a_signal_to_one_and_taken_up_again(
  smoke, launch, checked, start_local, tmp_path
):
  whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
  words = lambda run: training(smoke[0], run, *SHORT, hosts=2)
  code, said = launch('local', 'submit', *words(whole))
  assert code == 0, said
  process = start_local('submit', *words(stopped))
  wait_for_steps(stopped, process)
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
  assert first == 0 and 0 < saved < 150 and f'step {saved} of 160' in said
  _, said = launch('local', 'status', f'--run={stopped}')
  assert 'processes: none' in said and 'trainer: preempted at train' in said
  code, said = launch('local', 'submit', *words(stopped))
  assert code == 0, said
  ours, theirs = (gsae_jax.load(str(w)) for w in (stopped, whole))
  assert ours.metadata['step'] == theirs.metadata['step'] == 160
  for name, value in theirs.params.items():
    np.testing.assert_array_equal(ours.params[name], value)
  _, said = launch('local', 'logs', f'--run={stopped}', '--host=0-0')
  assert 'step 160 of 160' in said


def test_a_run_is_started_from_any_folder_of_the_clone(
  launch, checked, tmp_path
):
  words = f'--run={tmp_path}', '--config=smoke.py', '--steps=evaluate'
  code, said = launch('local', 'submit', *words, folder=ROOT / 'experiments')
  # It read the config, and found that nothing was trained.
  assert code == 1 and 'no checkpoints at' in said, said
  assert checked == [['--config=experiments/smoke.py']]


def test_delete_stops_a_run_and_watch_sees_its_end(
  smoke, launch, checked, start_local, tmp_path, monkeypatch
):
  words = training(smoke[0], tmp_path, '--config.train.steps=1000000')
  process = start_local('submit', *words)
  wait_for_steps(tmp_path, process)
  with monkeypatch.context() as patch:
    patch.setattr(local, '_run', lambda *_: pytest.fail('it runs twice'))
    code, said = launch('local', 'submit', *words)
  assert code == 1 and 'is running (processes' in said
  run = f'--run={tmp_path}'
  watch = start_local('watch', run, '--poll_seconds=0.1')
  _, said = launch('local', 'delete', run)
  assert f'{tmp_path} is left as it is' in said
  assert process.wait(timeout=60) == 42
  process.communicate()
  watch.communicate(timeout=60)
  assert watch.returncode == 0
  assert steps(tmp_path)[-1] > 0
  _, said = launch('local', 'status', run)
  assert 'trainer: deleted' in said


def test_the_step_of_a_worker_that_is_killed_saves_and_leaves(
  smoke, launch, start_local, tmp_path
):
  words = training(smoke[0], tmp_path, '--config.train.steps=1000000')
  process = start_local('submit', *words)
  wait_for_steps(tmp_path, process)
  (worker,) = json.loads((tmp_path / 'launch.json').read_text())['pids']
  os.kill(worker, signal.SIGKILL)
  said, _ = process.communicate(timeout=60)
  assert process.returncode == 42, said
  assert steps(tmp_path)[-1] > 0
  _, said = launch('local', 'status', f'--run={tmp_path}')
  assert 'processes: none' in said
