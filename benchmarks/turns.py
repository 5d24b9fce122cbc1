"""Processes that take turns, so that what is compared meets the same machine.

A worker is a process with one thing to measure. The driver lets each run once,
round after round; ratios are taken within rounds. On a CPU workers share one core
with one thread each, and keep the memory that they free: threads of several cores
spin when others work beside them, and large temporaries that are given back are
faulted in page by page again.
"""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks import record

_ONE = (
  'OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'NPROC',
  'JAX_NUM_CPU_DEVICES',
)  # fmt: skip
_KEPT = {
  'MALLOC_MMAP_THRESHOLD_': '20000000000',
  'MALLOC_TRIM_THRESHOLD_': '20000000000',
  'MALLOC_TOP_PAD_': '268435456',
}

# JAX puts a note about its traceback behind the line that says what happened.
_REASON = re.compile(r'[\w.]*[eE]rror: |[\w.]+Exception: ')


class Failed(Exception):
  """A worker ended before it should; says why in a line."""


@dataclasses.dataclass(frozen=True)
class Side:
  """What a worker measures.

  Attributes:
    run: one turn.
    about: plain data that the driver wants first.
    end: what it wants last; memory for this is not counted.
  """

  run: Callable[[], Any]
  about: dict[str, Any]
  end: Callable[[], dict[str, Any]] = dict


def serve(make: Callable[[], Side]) -> None:
  """The worker: a line in is a turn, the end of the input is the end."""
  out = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # What libraries print is no answer.

  def answer(value):
    print(json.dumps(value), file=out, flush=True)

  side = make()
  answer(side.about)
  for _ in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    side.run()
    answer(
      {'wall': time.perf_counter() - wall, 'cpu': time.process_time() - cpu}
    )
  peak = record.memory('VmHWM')
  answer({'peak_bytes': peak, 'versions': record.versions()} | side.end())


class Worker:
  """The driver's end of one."""

  def __init__(self, command: list[str], core: int | None):
    """Starts it.

    Args:
      command: Python, and what it runs.
      core: that it is pinned to; None is all of them, and a GPU.
    """
    env = os.environ | {
      'WANDB_MODE': 'disabled',
      'TQDM_DISABLE': '1',
      'TF_CPP_MIN_LOG_LEVEL': '3',
      'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',  # Others are on the GPU too.
    }
    if core is not None:
      command = ['taskset', '-c', str(core), *command]
      env |= _KEPT | dict.fromkeys(_ONE, '1') | {'JAX_PLATFORMS': 'cpu'}
    else:
      env.setdefault('CUDA_VISIBLE_DEVICES', '0')
    self._errors = tempfile.TemporaryFile('w+')
    self._process = subprocess.Popen(
      command,
      cwd=record.ROOT,
      env=env,
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
    )

  def read(self) -> dict[str, Any]:
    """The next answer.

    Raises:
      Failed: there is none.
    """
    line = self._process.stdout.readline()
    if line:
      return json.loads(line)
    self._process.wait()
    self._errors.seek(0)
    said = [line.strip() for line in self._errors if line.strip()]
    reasons = [line for line in said if _REASON.match(line)]
    code = f'ended with exit code {self._process.returncode}'
    raise Failed((reasons or said or [code])[-1])

  def turn(self) -> dict[str, float]:
    """Seconds of one turn: on the wall's clock, and of the processor."""
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.write('go\n')
      self._process.stdin.flush()
    return self.read()

  def end(self) -> dict[str, Any]:
    """Lets it end; what it says last."""
    self._process.stdin.close()
    return self.read()

  def close(self) -> None:
    """Whatever state it is in."""
    self._process.kill()
    self._process.wait()
    for stream in (self._process.stdin, self._process.stdout, self._errors):
      with contextlib.suppress(BrokenPipeError):
        stream.close()


class Measured(NamedTuple):
  """What came of the turns.

  Attributes:
    found: what each side said first and last, with the seconds of its turns as
      `turns`, of the processor if it is pinned and by the wall's clock if not.
    failed: why others were left out, by side.
    others_busy: share of the rounds' time that cores which are not the sides'
      were at work; None where sides are not pinned. Cores may share one's
      units, and a busy neighbour then takes speed.
  """

  found: dict[str, dict[str, Any]]
  failed: dict[str, str]
  others_busy: float | None


def _ticks(core: int | None) -> tuple[int, int]:
  """Of all cores but one, since the machine started: idle, and all."""
  idle = total = 0
  with open('/proc/stat') as f:
    for name, *counts in map(str.split, f):
      if re.fullmatch(r'cpu\d+', name) and name != f'cpu{core}':
        idle += int(counts[3]) + int(counts[4])
        total += sum(map(int, counts[:8]))
  return idle, total


@contextlib.contextmanager
def _closing(workers: dict[str, Worker]) -> Iterator[None]:
  try:
    yield
  finally:
    for worker in workers.values():
      worker.close()


def measure(
  commands: dict[str, list[str]], *, rounds: int, core: int | None
) -> Measured:
  """Starts a worker a side, one after the other, and lets them take turns.

  Args:
    commands: Python, and what it runs, by side.
    rounds: of turns.
    core: see `Worker`.
  """
  workers, found, failed = {}, {}, {}

  def ask(name, question):
    try:
      return question()
    except Failed as e:
      failed[name] = str(e)
      found.pop(name, None)

  def told(name, question):
    answer = ask(name, question)
    if name in found:
      found[name] |= answer

  with _closing(workers):
    for name, command in commands.items():
      workers[name] = Worker(command, core)
      found[name] = {'turns': [], 'wall': []}
      told(name, workers[name].read)
    idle, total = _ticks(core)
    for _ in range(rounds):
      for name in list(found):
        seconds = ask(name, workers[name].turn)
        if name in found:
          # One thread: what other programs do meanwhile does not count.
          clock = 'wall' if core is None else 'cpu'
          found[name]['turns'].append(seconds[clock])
          found[name]['wall'].append(seconds['wall'])
    idle, total = (
      b - a for a, b in zip((idle, total), _ticks(core), strict=True)
    )
    for name in list(found):
      told(name, workers[name].end)
  busy = None if core is None or not total else 1 - idle / total
  return Measured(found, failed, busy)
