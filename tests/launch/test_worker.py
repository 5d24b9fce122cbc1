"""The worker's rules, with steps that do as they are told."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from launch import identity
from tests.support.commands import wait_for
from tests.support.fake_metadata import fake_metadata
from tests.support.locations import ROOT

pytestmark = pytest.mark.integration

# A worker whose steps run STEP instead of the programs of the package.
WORKER = """
import os, sys
from launch import worker
worker.command = lambda given, step: [
  os.environ.get('PROGRAM', sys.executable), '-u', '-c', sys.argv[1], step,
  given.run, *given.flags,
]
worker._STARTS, worker._PAUSE, worker._LAST_LOGS = 3, 0, 0
worker._SOON = float(os.environ.get('SOON', '60'))
worker._NOTICES = worker._TRAINER = 0.02
sys.exit(worker.main(sys.argv[2:]))
"""
# Says what it was; then ends as the next line of its file says: with a code, by
# a signal, or with 42 once it gets one.
STEP = """
import os, pathlib, signal, sys
step, run = sys.argv[1:3]
todo = pathlib.Path(run, step)
first, *rest = todo.read_text().split()
todo.write_text(' '.join(rest))
def leave(*_):
  pathlib.Path(run, 'left').touch()
  sys.exit(42)
signal.signal(signal.SIGTERM, leave)
print('a bar 1%', end='\\r')
print('a bar 99%')
alone = os.getpgrp() == os.getpid()  # Else a signal would come twice.
print(*sys.argv[1:], first, 'alone' if alone else '', flush=True)
with open(f'{run}/order', 'a') as f:
  print(step, file=f)
if first == 'killed':
  os.kill(os.getpid(), signal.SIGKILL)
if first == 'waits':
  while True:
    signal.pause()
sys.exit(int(first))
"""


class Run:
  """A run's folder and a worker on it."""

  def __init__(self, folder, **steps):
    self.folder, self.steps = folder, steps
    for step, ends in steps.items():
      (folder / step).write_text(ends)

  def start(self, *flags, host=0, role='trainer', metadata=None, **env):
    environment = metadata.environment if metadata else {}
    where = [f'--host={host}'] if host is not None else []
    return subprocess.Popen(
      [
        sys.executable, '-c', WORKER, STEP, f'--run={self.folder}',
        f'--role={role}', f'--steps={",".join(self.steps)}', *where, *flags,
      ],
      cwd=ROOT,
      env=os.environ | environment | env,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )  # fmt: skip

  def order(self):
    file = self.folder / 'order'
    return file.read_text().split() if file.exists() else []

  def state(self, role='trainer'):
    file = self.folder / 'state' / f'{role}.json'
    return json.loads(file.read_text()) if file.exists() else None

  def logs(self, step):
    return [
      f.read_text() for f in sorted((self.folder / 'logs' / step).iterdir())
    ]


def end(process):
  out, err = process.communicate(timeout=60)
  assert 'Traceback' not in err, err
  return process.returncode, out, err


def test_steps_follow_one_another(tmp_path):
  run = Run(tmp_path, harvest='0', train='0', evaluate='0')
  code, out, _ = end(run.start('--', '--config=c.py', '--coordinator=auto'))
  assert code == 0 and run.order() == ['harvest', 'train', 'evaluate']
  line = f'train {tmp_path} --config=c.py --coordinator=auto 0 alone\n'
  assert line in out
  # Of a bar, what it was last.
  assert run.logs('train') == ['a bar 99%\n' + line]
  assert run.state()['state'] == 'finished'
  assert run.state()['step'] == 'evaluate'


def test_what_the_steps_are():
  from launch import worker

  given = ['--run=R', '--role=trainer', '--steps=train', '--store=S']
  given = worker.parse([*given, '--allow=lm', '--', '--config=c.py'])
  words = {step: worker.command(given, step)[3:] for step in worker.STEPS}
  config = '--config=c.py'
  allowed = '--allow-config-change=lm'
  assert words == {
    'harvest': ['gsae_jax.harvest', config, '--store=S'],
    'train': ['gsae_jax.train', config, '--store=S', '--workdir=R', allowed],
    'stream': ['gsae_jax.train', config, '--workdir=R', allowed],
    'evaluate': ['gsae_jax.evaluate', config, '--workdir=R'],
    'follow': ['gsae_jax.evaluate', config, '--workdir=R', '--watch'],
  }


def test_a_mistake_ends_all(tmp_path):
  run = Run(tmp_path, harvest='1', train='0')
  code, _, err = end(run.start())
  assert code == 1 and run.order() == ['harvest']
  assert run.state()['state'] == 'failed' and 'failed, its log says' in err


def test_what_is_no_mistake_is_tried_again_but_not_for_ever(tmp_path):
  run = Run(tmp_path, harvest='42 killed 0', train='0')
  code, _, err = end(run.start())
  assert code == 0 and run.order() == ['harvest'] * 3 + ['train']
  assert 'harvest ended with 42\n' in err and 'ended with -9\n' in err
  again = Run(tmp_path, train='killed 42 42 7 42 7 0')
  assert end(again.start())[0] == 1
  assert again.state()['reason'] == 'it ended with 7 after 3 starts'
  assert (tmp_path / 'train').read_text() == '0'
  # Each of them ran long enough to have come further.
  longer = Run(tmp_path, train='7 7 7 7 0')
  assert end(longer.start(SOON='0'))[0] == 0


def test_a_host_that_fails_ends_the_others(tmp_path):
  mistaken = Run(tmp_path, train='1')
  assert end(mistaken.start(host=1))[0] == 1
  assert mistaken.state()['state'] == 'failed'
  # To its neighbours, it is gone.
  run = Run(tmp_path, train='42 0')
  code, _, err = end(run.start(host=2))
  assert code == 1 and 'another host failed' in err
  assert (tmp_path / 'train').read_text() == '0'


def test_a_host_that_never_began_ends_the_others(tmp_path):
  run = Run(tmp_path, train='0')
  (tmp_path / 'state').mkdir()
  told = {'state': 'failed', 'step': 'startup'}
  (tmp_path / 'state/trainer.json').write_text(json.dumps(told))
  assert end(run.start())[0] == 1
  assert run.order() == [] and run.state() == told


def test_a_program_that_is_not_there(tmp_path):
  run = Run(tmp_path, train='0')
  # Without setpriv, which would be there.
  code, _, err = end(run.start(PROGRAM='/nowhere/python', PATH=''))
  assert code == 1 and run.state()['state'] == 'failed', err
  assert 'cannot be started' in run.state()['reason']


@pytest.mark.skipif(not shutil.which('setpriv'), reason='of Linux')
def test_a_worker_that_is_killed_leaves_no_step_behind(tmp_path):
  run = Run(tmp_path, train='waits')
  process = run.start()
  wait_for(run.order, process)
  process.kill()
  process.communicate()
  end = time.monotonic() + 60
  while not (tmp_path / 'left').exists():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_a_setpriv_that_lacks_the_option_is_left_out(tmp_path):
  old = tmp_path / 'bin' / 'setpriv'
  old.parent.mkdir()
  old.write_text('#!/bin/sh\nexit 1\n')
  old.chmod(0o755)
  run = Run(tmp_path, train='0')
  code, out, err = end(run.start(PATH=f'{old.parent}:{os.environ["PATH"]}'))
  assert code == 0 and run.order() == ['train'], err


def test_a_run_that_was_deleted_stays_so(tmp_path):
  run = Run(tmp_path, train='waits')
  process = run.start()
  wait_for(run.order, process)
  identity.tell_deleted(epath.Path(tmp_path), ('trainer',))
  process.send_signal(signal.SIGTERM)
  assert end(process)[0] == 42
  assert run.state()['state'] == 'deleted'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_step(tmp_path, number):
  run = Run(tmp_path, harvest='0 0', train='waits 0', evaluate='0')
  process = run.start()
  wait_for(lambda: 'train' in run.order(), process)
  process.send_signal(number)
  code, _, err = end(process)
  assert code == 42 and run.order() == ['harvest', 'train'], err
  assert run.state()['state'] == 'preempted'
  assert run.state()['reason'] == f'{number.name} came'
  assert end(run.start())[0] == 0
  assert run.order()[2:] == ['harvest', 'train', 'evaluate']


def test_a_notice_of_preemption_is_a_signal(tmp_path):
  run = Run(tmp_path, train='waits')
  with fake_metadata() as metadata:
    metadata.values['instance/maintenance-event'] = (
      'MIGRATE_ON_HOST_MAINTENANCE'
    )
    process = run.start('--notices', metadata=metadata)
    wait_for(run.order, process)
    metadata.values['instance/preempted'] = 'TRUE'
    code, _, err = end(process)
  assert code == 42, err
  assert run.state()['reason'] == 'the machine is being preempted'


def test_maintenance_is_waited_for(tmp_path):
  run = Run(tmp_path, train='waits 0')
  with fake_metadata() as metadata:
    process = run.start('--notices', metadata=metadata)
    wait_for(run.order, process)
    event = 'instance/maintenance-event'
    metadata.values[event] = 'TERMINATE_ON_HOST_MAINTENANCE'
    first = len(metadata.asked)
    wait_for(lambda: metadata.asked[first:].count(event) > 20, process)
    assert run.order() == ['train']
    metadata.values[event] = 'NONE'
    code, _, err = end(process)
  assert code == 0 and run.order() == ['train'] * 2, err
  assert 'waiting until the maintenance is over' in err


def test_no_step_begins_on_a_machine_that_goes_for_good(tmp_path):
  run = Run(tmp_path, train='waits 0')
  with fake_metadata() as metadata:
    event = 'instance/maintenance-event'
    process = run.start('--notices', metadata=metadata)
    wait_for(run.order, process)
    metadata.values[event] = 'TERMINATE_ON_HOST_MAINTENANCE'
    first = len(metadata.asked)
    wait_for(lambda: metadata.asked[first:].count(event) > 20, process)
    metadata.values['instance/preempted'] = 'TRUE'
    code, _, err = end(process)
  assert code == 42 and run.order() == ['train'], err
  assert run.state()['reason'] == 'the machine is being preempted'


QUEUED = 'projects/p/locations/z/queuedResources/run1'


@pytest.mark.parametrize(
  'worker, ends, deleted',
  [
    ('0', '0', True),
    ('0', '1', True),
    ('1', '0', False),
    ('0', 'waits', False),
  ],
)
def test_the_first_host_deletes_the_machines_when_all_is_over(
  tmp_path, worker, ends, deleted
):
  run = Run(tmp_path, train=ends)
  with fake_metadata() as metadata:
    metadata.values['instance/attributes/agent-worker-number'] = worker
    metadata.values['instance/attributes/tpu-env'] = (
      "ACCELERATOR_TYPE: 'v5litepod-16'\nMEGASCALE_SLICE_ID: '0'\n"
    )
    flag = f'--queued_resource={QUEUED}'
    process = run.start(flag, host=None, metadata=metadata)
    if ends == 'waits':
      wait_for(run.order, process)
      process.send_signal(signal.SIGTERM)
    _, _, err = end(process)
    wanted = ('DELETE', f'/v2/{QUEUED}?force=true', 'Bearer ya29.a-b_c', b'')
    assert metadata.requests == ([wanted] if deleted else []), err
  assert (run.state() is None) == (worker == '1')


def test_an_evaluator_does_not_wait_for_a_trainer_that_failed(tmp_path):
  run = Run(tmp_path, follow='waits')
  process = run.start(role='evaluator')
  wait_for(run.order, process)
  (tmp_path / 'state' / 'trainer.json').write_text('{"state": "failed"}')
  code, _, err = end(process)
  assert code == 1, err
  assert run.state('evaluator')['reason'] == 'the trainer failed'
