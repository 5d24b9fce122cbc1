"""`python -m launch local`: a run in processes of this machine, as many hosts.

Each has fake devices on the CPU: for trying what will run on a pod. Stops and
goes on as there: a signal to one of the workers stops all of them.
"""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from absl import flags

from gsae_jax.errors import FAILED, PREEMPTED, UserError
from launch import door, identity, package, view
from launch.submission import Submission, asked_before, check_hosts

_POLL = 0.05


def define_flags(values: flags.FlagValues, verb: str) -> None:
  """Adds the flags of a verb."""
  door.define_run(values)
  if verb == 'submit':
    door.define_submission(values)
    flags.DEFINE_integer(
      'processes', 1, 'As many as there would be hosts.', flag_values=values
    )
    flags.DEFINE_integer(
      'devices', 1, 'Fake ones, of each.', flag_values=values
    )
  door.define_following(values, verb, 1.0)


def submit(given: flags.FlagValues) -> int:
  """Runs to the end, in the foreground; returns the exit code."""
  for name in ('processes', 'devices'):
    count: int = getattr(given, name)
    if count < 1:
      raise UserError(f'--{name}: {count} is less than 1')
  chips = given.processes * given.devices
  run = door.read_submission(given, chips=chips, remote=False)
  check_hosts(run.store is None, given.processes)
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    place = f'127.0.0.1:{s.getsockname()[1]}'
  commands = []
  for host in range(given.processes):
    where = (f'--coordinator={place}', f'--processes={given.processes}')
    own = [*where, f'--process={host}']
    words = run.worker_arguments('trainer', own, host=host)
    commands.append([sys.executable, '-m', 'launch.worker', *words])
  environment = {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(given.devices),
    # XLA's pool: collectives of fake devices deadlock in one that is smaller.
    'NPROC': str(max(16, 2 * given.devices)),
  }
  if given.dry_run:
    settings = ' '.join(f'{k}={v}' for k, v in environment.items())
    for command in commands:
      print(settings, *command)
    return 0
  there = asked_before(run.run, 'local')
  if there and (pids := _alive(there)):
    raise UserError(
      f'--run: {run.run} is running (processes {_list(pids)}); watch it, or '
      'delete it first'
    )
  run.record('local', ('trainer',), {'pids': []})
  return _run(run, commands, environment)


def _run(
  run: Submission, commands: list[list[str]], environment: dict[str, str]
) -> int:
  workers: list[subprocess.Popen] = []
  launch: dict[str, Any] = {'target': 'local', 'code': run.code.id, 'pids': []}

  def forward(number, frame):
    del frame
    left = [w for w in workers if w.poll() is None]
    for w in left:
      w.send_signal(number)
    if not left:
      _send(launch, number)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, forward)
  root = package.root_of(pathlib.Path.cwd())
  for command in commands:  # Each alone in its group: signals come from here.
    worker = subprocess.Popen(
      command,
      cwd=root,
      env=os.environ | environment,
      start_new_session=True,
    )
    workers.append(worker)
    launch['pids'].append(worker.pid)
  identity.write_json(run.run / 'launch.json', launch)
  code = _wait(workers)
  _stop(launch)  # The step of a worker that was killed.
  return code


def _wait(workers: list[subprocess.Popen]) -> int:
  """Until all are gone; as of a pod, the first that stops takes the others."""
  left, worst = list(workers), 0
  while left:
    time.sleep(_POLL)
    for w in [w for w in left if w.poll() is not None]:
      left.remove(w)
      if w.returncode:
        # One that was killed is a machine that is gone.
        gone = w.returncode < 0 or w.returncode == PREEMPTED
        worst = PREEMPTED if gone and worst != FAILED else FAILED
        for other in left:
          other.send_signal(signal.SIGTERM)
  return worst


def _commands() -> Iterator[tuple[int, str]]:
  """Processes of this machine, and what they were started as."""
  proc = pathlib.Path('/proc')
  if (proc / 'self').exists():
    for folder in proc.glob('[0-9]*'):
      with contextlib.suppress(OSError):  # It is gone.
        words = (folder / 'cmdline').read_bytes().decode(errors='replace')
        yield int(folder.name), words.replace('\0', ' ')
    return
  shown = subprocess.run(
    ['ps', '-A', '-ww', '-o', 'pid=', '-o', 'command='],
    capture_output=True,
    text=True,
  )
  for line in shown.stdout.splitlines():
    pid, _, command = line.strip().partition(' ')
    yield int(pid), command


def _alive(launch: dict) -> list[int]:
  """A run's workers that are still there, and steps whose worker is not."""
  found = {}
  for pid, command in _commands():
    # Not another that has its number now.
    if '-m launch.worker' in command or '-m gsae_jax.' in command:
      with contextlib.suppress(OSError):
        session = os.getsid(pid)  # Each worker has one.
        if session in launch['pids']:
          found[pid] = session
  return [p for p, of in found.items() if p == of or of not in found]


def _stop(launch: dict) -> None:
  """Makes what is still there save and leave, and waits for it."""
  _send(launch, signal.SIGTERM)
  while _alive(launch):
    time.sleep(_POLL)


def _send(launch: dict, number: int) -> None:
  for pid in _alive(launch):
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, number)


def _list(pids: list[int]) -> str:
  return ', '.join(map(str, pids)) or 'none'


def status(given: flags.FlagValues) -> None:
  run, launch = door.read_launch(given, 'local', remote=False)
  print(f'processes: {_list(_alive(launch))}')
  view.show_state(run)


def watch(given: flags.FlagValues) -> int:
  """Until the processes are gone; returns the exit code of such a run."""
  run, launch = door.read_launch(given, 'local', remote=False)
  pause = door.make_pause(given.poll_seconds)
  while _alive(launch):
    pause()
  view.conclude(run)
  return 0 if view.is_over(run, 'trainer') else PREEMPTED


def logs(given: flags.FlagValues) -> None:
  run, _ = door.read_launch(given, 'local', remote=False)
  view.show_log(run, given.host)


def delete(given: flags.FlagValues) -> None:
  """Stops the processes, which save; the folder stays."""
  run, launch = door.read_launch(given, 'local', remote=False)
  pids = _alive(launch)
  identity.tell_deleted(run, ('trainer',))  # Before, for who watches.
  _stop(launch)
  identity.tell_deleted(run, ('trainer',))
  print(f'{run.name}: processes {_list(pids)} are gone; {run} is left as it is')
