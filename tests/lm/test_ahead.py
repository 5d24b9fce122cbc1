"""Work that another thread does ahead."""

import subprocess
import sys
import threading
import time

import pytest

from gsae_jax.errors import Preempted
from gsae_jax.lm.ahead import ahead
from tests.support.locations import ROOT


def threads():
  return [t for t in threading.enumerate() if t.name == 'text']


def wait_until(condition):
  for _ in range(1000):
    if condition():
      return
    time.sleep(0.005)
  raise AssertionError


def test_it_is_one_item_ahead_and_no_more():
  made = []

  def items(unwanted):
    for i in range(5):
      made.append(i)
      yield i

  got = ahead(items)
  for i in range(5):
    assert next(got) == i
    wait_until(lambda: not threads())
    assert len(made) == min(i + 2, 5)
  assert list(got) == []


def test_what_goes_wrong_is_for_whoever_waits():
  def items(unwanted):
    yield 1
    raise ValueError('half way')

  got = ahead(items)
  assert next(got) == 1
  with pytest.raises(ValueError, match='half way'):
    next(got)
  assert not threads()


def endless(unwanted):
  yield 1
  while not unwanted():
    time.sleep(0.001)


def test_closed_or_forgotten_it_leaves_what_it_makes():
  for leave in (lambda got: got.close(), lambda got: None):
    got = ahead(endless)
    assert next(got) == 1 and threads()
    leave(got)
    del got
    assert not threads()


@pytest.mark.integration
def test_a_program_that_ends_does_not_wait():
  code = (
    'import time\n'
    'from gsae_jax.lm.ahead import ahead\n'
    'def endless(unwanted):\n'
    '  yield 1\n'
    '  while not unwanted(): time.sleep(0.001)\n'
    'kept = ahead(endless); next(kept)'
  )
  subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, timeout=60)


def test_whoever_waits_can_leave():
  gate = threading.Event()

  def items(unwanted):
    yield 1
    while not gate.wait(0.01) and not unwanted():
      pass
    yield 2

  ticks = []

  def tick():
    ticks.append(0)
    if len(ticks) > 3:
      raise Preempted

  made = ahead(items, tick)
  assert next(made) == 1
  with pytest.raises(Preempted):
    next(made)
  wait_until(lambda: not threads())
  assert not gate.is_set()
