"""Runs the commands: in a process that stays, or in processes of their own."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time

from tests.support.locations import ROOT

SMOKE = 'experiments/smoke.py'


def words_of(program, flags, config):
  """Arguments of a command of the package; most take a config."""
  if config and program not in ('report', 'store'):
    return [f'--config={config}', *map(str, flags)]
  return [*map(str, flags)]


def environment(devices=1, **changes):
  """Variables of a process with so many devices."""
  # XLA's pool must be larger than the number of devices: see conftest.py.
  found = os.environ | {'JAX_PLATFORMS': 'cpu', 'NPROC': '16'}
  found['JAX_NUM_CPU_DEVICES'] = str(devices)
  return found | changes


def start(
  program,
  *flags,
  config=SMOKE,
  devices=1,
  package='gsae_jax',
  kill=False,
  **env,
):
  """Starts a command in a process of its own.

  Args:
    program: module of the package.
    *flags: its arguments.
    config: value of --config.
    devices: how many fake ones it has.
    package: where the program is.
    kill: the test kills it. It then reads compiled programs from the cache and
      writes none, since half an entry would stay.
    **env: further variables.
  """
  if kill:
    env['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '1000000'
  return subprocess.Popen(
    [sys.executable, '-m', f'{package}.{program}']
    + words_of(program, flags, config),
    cwd=ROOT,
    env=environment(devices, **env),
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def run_process(program, *flags, code=0, timeout=300, **kwargs):
  """Runs a command in a process of its own; returns what it printed."""
  process = start(program, *flags, **kwargs)
  out, err = process.communicate(timeout=timeout)
  assert process.returncode == code, err
  return out


class Server:
  """A process that runs commands, one after the other; see server.py."""

  def __init__(self, environment):
    self._errors = tempfile.TemporaryFile('w+')
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'tests.support.server'],
      cwd=ROOT,
      env=environment,
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
    )

  def call(self, module, words):
    """Returns exit code, standard output and standard error of a command."""
    request = json.dumps({'module': module, 'words': words})
    # A command that hangs is ended, and fails its test.
    timer = threading.Timer(600, self._process.kill)
    timer.start()
    try:
      self._process.stdin.write(request + '\n')
      self._process.stdin.flush()
      answer = self._process.stdout.readline()
    finally:
      timer.cancel()
    if not answer:
      self._errors.seek(0)
      raise AssertionError(f'the server died: {self._errors.read()[-2000:]}')
    found = json.loads(answer)
    return found['code'], found['out'], found['err']

  def close(self):
    self._process.communicate()
    self._errors.close()


_SERVERS = {}


def close_servers():
  """Ends the processes that `call` started."""
  while _SERVERS:
    _SERVERS.popitem()[1].close()


def call(program, *flags, config=SMOKE, devices=1, package='gsae_jax', **env):
  """Runs a command to its end, in a process that other commands use too.

  Returns:
    exit code, standard output, standard error.
  """
  key = devices, *sorted(env.items())
  if key not in _SERVERS:
    _SERVERS[key] = Server(environment(devices, **env))
  words = words_of(program, flags, config)
  try:
    return _SERVERS[key].call(f'{package}.{program}', words)
  except AssertionError:
    del _SERVERS[key]
    raise


def run(program, *flags, code=0, **kwargs):
  """Runs a command to its end; returns what it printed."""
  found, out, err = call(program, *flags, **kwargs)
  assert found == code, err
  return out


def refuse(program, *flags, match, **kwargs):
  """The command exits with 1, and one line with `match`, not a traceback."""
  code, _, err = call(program, *flags, **kwargs)
  assert code == 1, err
  check_refusal(err, match)


def check_refusal(err, match):
  """Standard error has one line that says what is wrong, and no traceback."""
  assert 'Traceback' not in err, err
  lines = [line for line in err.splitlines() if line.startswith('error: ')]
  assert len(lines) == 1 and match in lines[0], err


def wait_for(condition, process):
  while not condition():
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)


def metrics(text):
  """What metrics.jsonl says of members; the rest are times and memory."""
  records = [json.loads(line) for line in text.splitlines()]
  return [r for r in records if r['member']]


def metrics_of(workdir):
  return metrics((workdir / 'metrics.jsonl').read_text())


def files(folder):
  """Contents by name, without the leftovers of killed writers."""
  return {
    str(p.relative_to(folder)): p.read_bytes()
    for p in sorted(folder.rglob('*'))
    if p.is_file() and not p.name.endswith('.__lock')
  }


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def start_both(*flags, program='harvest', own=((), ()), **kwargs):
  """Starts a command in two processes; `own` are flags of each."""
  place = f'--coordinator=127.0.0.1:{free_port()}'
  return [
    start(
      program, *flags, place, '--processes=2', f'--process={i}', *own[i],
      devices=2,
      **kwargs,
    )
    for i in range(2)
  ]  # fmt: skip


def finish(both):
  """Exit codes and what was printed."""
  outputs = [p.communicate(timeout=300) for p in both]
  return [p.returncode for p in both], outputs
