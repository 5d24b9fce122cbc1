"""What is kept of what a program prints."""

import os
import threading
import types

import pytest
from etils import epath

from launch import logs


class Pipe:
  """Gives one chunk after the other, as a pipe may cut them."""

  def __init__(self, *chunks):
    self._chunks = [*chunks, b'']

  def read1(self, size):
    return self._chunks.pop(0)


def test_a_bar_is_kept_as_it_was_last(tmp_path, capsysbinary):
  chunks = b'first\n\r 1%', b'\r 2%\r', b'100%', b'\nlast'
  log = logs.Log(Pipe(*chunks), epath.Path(tmp_path) / 'a/b.log')
  log.finish()
  assert (tmp_path / 'a/b.log').read_bytes() == b'first\n100%\nlast'
  assert capsysbinary.readouterr().out == b''.join(chunks)


def test_longer_logs_are_written_less_often(tmp_path, monkeypatch):
  long = threading.Event()

  class Event(threading.Event):
    def wait(self, timeout=None):
      # 15 s, and 15 s more for a megabyte.
      assert timeout == 15.0 or timeout == pytest.approx(30.0)
      if timeout > 15.0:
        long.set()
      return super().wait(0.01)

  class Growing(Pipe):
    def read1(self, size):
      if len(self._chunks) == 1:
        long.wait(20)
      return super().read1(size)

  names = types.SimpleNamespace(
    Event=Event, Lock=threading.Lock, Thread=threading.Thread
  )
  monkeypatch.setattr(logs, 'threading', names)
  log = logs.Log(
    Growing((b'x' * 1023 + b'\n') * 1024), epath.Path(tmp_path) / 'b.log'
  )
  log.join()
  log.finish()
  assert long.is_set()


def test_the_newest_log_of_a_host(tmp_path):
  run = epath.Path(tmp_path)
  assert logs.latest(run, '0-0') is None
  for name in ('train/2.0-0', 'harvest/1.0-0', 'train/3.0-1', 'startup/vm'):
    path = run / 'logs' / f'{name}.log'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  assert logs.latest(run, '0-0') == run / 'logs/train/2.0-0.log'
  assert logs.latest(run, '0-2') is None


def test_a_pipe_that_somebody_else_holds(tmp_path, capsysbinary, monkeypatch):
  monkeypatch.setattr(logs, '_LAST', 0.5)
  read, write = os.pipe()
  os.write(write, b'all of it')
  with open(read, 'rb') as pipe:
    log = logs.Log(pipe, epath.Path(tmp_path) / 'b.log')
    log.finish()
    assert (tmp_path / 'b.log').read_bytes() == b'all of it'
    os.close(write)
    log.join()
