"""A pytest plugin that writes where the time of every test goes.

`pytest -p tests.timing.plugin` with TEST_TIMINGS set to a folder leaves a file of
JSON lines in it for each process that runs tests.
"""

import json
import os
import pathlib
import resource
import time

import pytest

_CHILDREN = pathlib.Path(__file__).parent / 'children'


class Timing:
  """Writes a line per test: seconds by cause, of the test and its fixtures."""

  def __init__(self, folder: pathlib.Path):
    folder.mkdir(parents=True, exist_ok=True)
    self._out = folder / f'{os.getpid()}.jsonl'
    self._children = folder / f'{os.getpid()}.children'
    self._compile = 0.0
    os.environ['TEST_TIMES'] = str(self._children)
    os.environ['PYTHONPATH'] = os.pathsep.join(
      [str(_CHILDREN), *filter(None, [os.environ.get('PYTHONPATH')])]
    )
    import jax  # Only now: conftest.py says how many devices there are.

    jax.monitoring.register_event_duration_secs_listener(self._compiled)

  def _compiled(self, event, seconds, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      self._compile += seconds

  @pytest.hookimpl(wrapper=True)
  def pytest_runtest_protocol(self, item):
    self._children.unlink(missing_ok=True)
    self._compile = 0.0
    wall, own, children = time.perf_counter(), _cpu(False), _cpu(True)
    result = yield
    wall = time.perf_counter() - wall
    started = []
    if self._children.exists():
      started = map(json.loads, self._children.read_text().splitlines())
    started = list(started)
    own, children = _cpu(False) - own, _cpu(True) - children
    children += sum(c['cpu'] for c in started if c['stays'])
    record = {
      'test': item.nodeid,
      'slow': item.get_closest_marker('slow') is not None,
      'wall': wall,
      'cpu': own + children,
      'imports': sum(c['imports'] for c in started),
      'compile': self._compile + sum(c['compile'] for c in started),
      'processes': len(started),
      'waiting': max(0.0, wall - own - children),
    }
    with open(self._out, 'a') as file:
      file.write(json.dumps(record) + '\n')
    return result


def _cpu(children: bool) -> float:
  who = resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF
  used = resource.getrusage(who)
  return used.ru_utime + used.ru_stime


def pytest_configure(config):
  if folder := os.environ.get('TEST_TIMINGS'):
    config.pluginmanager.register(Timing(pathlib.Path(folder)))
