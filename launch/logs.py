"""What a program prints, shown and kept in the run's folder as it grows."""

import io
import sys
import threading
import time

from etils import epath

from gsae_jax import paths

_EVERY = 15.0  # Seconds; the object is written whole each time, so longer
_PER_MB = 15.0  # for longer logs.
_LAST = 10.0  # What is still in the pipe of a program that is gone.


class Log(threading.Thread):
  """Reads a pipe to its end; writes what came to stdout and to a file.

  A progress bar, which goes back to the start of its line, is kept as it was
  last, so that days of it are a line.
  """

  def __init__(self, pipe: io.BufferedReader, path: epath.Path):
    super().__init__(daemon=True)
    self._pipe, self._path = pipe, path
    self._lines, self._last = bytearray(), b''
    self._lock = threading.Lock()
    self._end = threading.Event()
    self._keeper = threading.Thread(target=self._keep, daemon=True)
    self._keeper.start()
    self.start()

  def run(self) -> None:
    while chunk := self._pipe.read1(65536):
      sys.stdout.buffer.write(chunk)
      sys.stdout.buffer.flush()
      with self._lock:
        self._add(chunk)
    self._end.set()

  def _add(self, chunk: bytes) -> None:
    *whole, self._last = (self._last + chunk).split(b'\n')
    for line in whole:
      self._lines += _shown(line) + b'\n'
    back = b'\r' if self._last.endswith(b'\r') else b''
    self._last = _shown(self._last) + back

  def _keep(self) -> None:
    kept = None
    while not self._end.wait(_EVERY + _PER_MB * len(self._lines) / 2**20):
      kept = self._write(kept)
    self._write(kept)

  def _write(self, kept: bytes | None) -> bytes | None:
    with self._lock:
      content = bytes(self._lines) + _shown(self._last)
    if content == kept:
      return kept
    try:
      paths.write_whole(self._path, content)
    except Exception as e:  # The step is worth more than its log.
      print(f'cannot write {self._path} ({e})', file=sys.stderr)
      return kept
    return content

  def finish(self) -> None:
    """Waits until all is kept, unless what it left behind holds the pipe."""
    self.join(_LAST)
    self._end.set()
    self._keeper.join()


def _shown(line: bytes) -> bytes:
  """What a terminal shows of a line: what is behind its last return."""
  texts = [text for text in line.split(b'\r') if text]
  return texts[-1] if texts else b''


def log_path(run: epath.Path, step: str, host: str) -> epath.Path:
  """Where a start of a step keeps its log."""
  begun = time.strftime('%Y-%m-%dT%H-%M-%S', time.gmtime())
  return run / 'logs' / step / f'{begun}.{host}.log'


def latest(run: epath.Path, host: str) -> epath.Path | None:
  """The newest log of a host."""
  folder = run / 'logs'
  if not folder.exists():
    return None
  found = [
    log
    for step in folder.iterdir()
    for log in step.iterdir()
    if log.name.endswith(f'.{host}.log')
  ]
  return max(found, key=lambda log: log.name, default=None)
