r"""What runs on each host: the steps of a run, one after the other.

  python -m launch.worker --run=gs://BUCKET/runs/NAME --role=trainer \
      --steps=harvest,train,evaluate --store=gs://BUCKET/store -- FLAGS

FLAGS are given to every step. A step is a program of gsae_jax in a process of
its own: when it ends with 0 the next one begins, with 1 all is over, and with
anything else it is started again. SIGTERM, and a notice that the machine will
be taken away, make the step save and leave; the worker then leaves with 42.
"""

import argparse
import functools
import http.client
import io
import os
import signal
import subprocess
import sys
import time
from typing import cast

from gsae_jax import paths
from gsae_jax.errors import FAILED, PREEMPTED, UserError
from launch import identity, logs, metadata

# Of a step that crashes soon after each; not of one whose neighbours were away.
_STARTS = 20
_SOON = 600.0  # JAX waits half of it for the others.
_PAUSE = 5.0  # Longer with each crash.
_NOTICES = 2.0  # A preempted machine has thirty.
_TRAINER = 60.0
_LAST_LOGS = 20.0

_TRAINER_FAILED = 'the trainer failed'

# What a step is: a program, and what it needs beside the flags of all.
STEPS = {
  'harvest': ('harvest', ('store',)),
  'train': ('train', ('store', 'workdir')),
  'stream': ('train', ('workdir',)),  # Without a store.
  'evaluate': ('evaluate', ('workdir',)),
  'follow': ('evaluate', ('workdir', 'watch')),  # Beside the trainer.
}


class Worker:
  """The steps of one host, and what stops them."""

  def __init__(self, given: argparse.Namespace):
    self._given = given
    self._run = paths.workdir(given.run, '--run')
    slice_, host = (0, given.host)
    if given.host is None:
      slice_, host = metadata.place()
    self.is_first = (slice_, host) == (0, 0)
    self._host = f'{slice_}-{host}'
    self._child: subprocess.Popen[bytes] | None = None
    self._why: str | None = None  # It has to stop.

  def stop(self, why: str, number: int = signal.SIGTERM) -> None:
    """Makes the step that runs save and leave."""
    if self._why and why == metadata.MAINTENANCE:
      return  # Which is no reason to stay.
    self._why = why
    self._say(f'{why}; saving')
    child = self._child
    if child is not None and child.poll() is None:
      child.send_signal(number)

  def run(self) -> int:
    """Runs the steps; returns the exit code."""
    about = self._about(self._given.role)
    if about['state'] == 'failed' and about['step'] == 'startup':
      self._say('another host failed')  # It does not come.
      return FAILED
    for step in self._given.steps:
      if code := self._run_step(step):
        return code
    self.tell('finished', self._given.steps[-1])
    return 0

  def _run_step(self, step: str) -> int:
    crashes = 0
    while True:
      if self._why == metadata.MAINTENANCE:
        self._wait_for_maintenance()
      if self._why:
        return self._stopped(step)
      self.tell('running', step)
      begun = time.monotonic()
      try:
        code = self._start(step)
      except OSError as e:
        return self._failed(step, f'it cannot be started ({e})')
      if code == 0:
        return 0
      self._say(f'{step} ended with {code}')
      if self._why:
        continue
      if code == FAILED:
        return self._failed(step, 'its log says why')
      if time.monotonic() - begun > _SOON:
        crashes = 0
      crashes += code != PREEMPTED
      if crashes == _STARTS:
        return self._failed(
          step, f'it ended with {code} after {crashes} starts'
        )
      # A neighbour is gone, most often, and comes back; unless it failed.
      self._pause(_PAUSE * max(crashes, 1))
      if self._is_failed(self._given.role):
        self._say(f'{step}: another host failed')
        return FAILED

  def _stopped(self, step: str) -> int:
    if self._why == _TRAINER_FAILED:
      return self._failed(step, self._why)
    self.tell('preempted', step, self._why)
    return PREEMPTED

  def _failed(self, step: str, reason: str) -> int:
    self.tell('failed', step, reason)
    return FAILED

  def _start(self, step: str) -> int:
    # Alone in its group: signals come from here, and once.
    self._child = child = subprocess.Popen(
      [*_with_parent(), *command(self._given, step)],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      process_group=0,
    )
    if self._why:  # It came in between.
      child.terminate()
    pipe = cast(io.BufferedReader, child.stdout)  # Of PIPE, in bytes.
    log = logs.Log(pipe, logs.log_path(self._run, step, self._host))
    code = child.wait()
    log.finish()
    return code

  def _pause(self, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not self._why and time.monotonic() < end:
      time.sleep(0.2)

  def _wait_for_maintenance(self) -> None:
    """Until the machine goes, or the notice does."""
    self._say('waiting until the maintenance is over')
    while self._why == metadata.MAINTENANCE and metadata.notice():
      time.sleep(_NOTICES)
    if self._why == metadata.MAINTENANCE:  # And no signal since.
      self._why = None

  def _about(self, role: str) -> dict:
    """What was told of a role last."""
    try:
      about = identity.told(self._run).get(role)
    except Exception:  # The storage's; it is asked again.
      about = None
    return about or {'state': None, 'step': None}

  def _is_failed(self, role: str) -> bool:
    return self._about(role)['state'] in ('failed', 'deleted')

  def trainer_failed(self) -> str | None:
    """For the evaluator: whether there is no more to come."""
    return _TRAINER_FAILED if self._is_failed('trainer') else None

  def tell(self, state: str, step: str, reason: str | None = None) -> None:
    """Says where the run is: the first host, for all, or whichever failed."""
    self._say(f'{step}: {state}' + (f', {reason}' if reason else ''))
    if not self.is_first and state != 'failed':
      return
    if self._about(self._given.role)['state'] == 'deleted':
      return  # Else `watch` would ask for machines again.
    try:
      identity.tell(self._run, self._given.role, state, step, reason)
    except Exception as e:  # The step is worth more than what is said of it.
      self._say(f'cannot write the state ({e})')

  def _say(self, text: str) -> None:
    # Not print: a signal's handler must not find its buffer in use.
    os.write(2, f'worker {self._host}: {text}\n'.encode())


@functools.cache
def _with_parent() -> tuple[str, ...]:
  """What in front of a command sends it SIGTERM if this process is killed."""
  words = ('setpriv', '--pdeathsig', 'TERM')  # Not all of Linux has it.
  try:
    done = subprocess.run([*words, 'true'], capture_output=True)
  except OSError:
    return ()
  return words if done.returncode == 0 else ()


def command(given: argparse.Namespace, step: str) -> list[str]:
  """What runs a step."""
  program, wants = STEPS[step]
  words = [sys.executable, '-u', '-m', f'gsae_jax.{program}', *given.flags]
  values = {'store': given.store, 'workdir': given.run}
  words += [
    f'--{name}={values[name]}' if name in values else f'--{name}'
    for name in wants
  ]
  if program == 'train':
    words += [f'--allow-config-change={field}' for field in given.allow]
  return words


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog='launch.worker')
  parser.add_argument('--run', required=True)
  parser.add_argument('--role', required=True)
  parser.add_argument('--steps', required=True, type=lambda s: s.split(','))
  parser.add_argument('--store')
  parser.add_argument('--allow', action='append', default=[])
  parser.add_argument('--host', type=int, help='Else the machine says.')
  parser.add_argument('--notices', action='store_true')
  parser.add_argument('--queued_resource', help='To delete when all is over.')
  parser.add_argument('flags', nargs='*')
  return parser.parse_args(argv)


def main(argv: list[str]) -> int:
  given = parse(argv)
  worker = Worker(given)
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(
      number,
      lambda n, _: worker.stop(f'{signal.Signals(n).name} came', n),
    )
  watches = []
  if given.notices:
    watches.append(metadata.Watch(metadata.notice, worker.stop, _NOTICES))
  if given.role == 'evaluator':  # Which would wait for checkpoints for ever.
    ask = worker.trainer_failed
    watches.append(metadata.Watch(ask, worker.stop, _TRAINER))
  for watch in watches:
    watch.start()
  code = worker.run()
  for watch in watches:
    watch.stop()
  if given.queued_resource and worker.is_first and code != PREEMPTED:
    time.sleep(_LAST_LOGS)  # Of the other hosts.
    try:
      metadata.delete(given.queued_resource)
    except (OSError, http.client.HTTPException) as e:
      print(
        f'cannot delete {given.queued_resource} ({e}), which costs until it is',
        file=sys.stderr,
      )
  return code


if __name__ == '__main__':
  try:
    sys.exit(main(sys.argv[1:]))
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(FAILED)
