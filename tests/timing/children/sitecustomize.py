"""Times the Python processes that tests start.

Python imports this file before anything else where its folder is on PYTHONPATH.
At its end, the process appends one JSON line to the file that TEST_TIMES names:
seconds of wall and processor time, inside outermost imports, and in XLA's compiler.
"""

import atexit
import builtins
import json
import os
import sys
import time

_found = {'imports': 0.0, 'compile': 0.0}


def _time_imports():
  original, depth = builtins.__import__, [0]

  def timed(*args, **kwargs):
    if depth[0]:
      return original(*args, **kwargs)
    depth[0] = 1
    start = time.perf_counter()
    try:
      return original(*args, **kwargs)
    finally:
      depth[0] = 0
      _found['imports'] += time.perf_counter() - start
      monitoring = sys.modules.get('jax._src.monitoring')
      if monitoring and not _found.get('listening'):
        _found['listening'] = True
        monitoring.register_event_duration_secs_listener(_compiled)

  builtins.__import__ = timed


def _compiled(event, seconds, **_):
  if event == '/jax/core/compile/backend_compile_duration':
    _found['compile'] += seconds


def report(stays=False):
  """Writes what was used since the last report.

  Args:
    stays: the process goes on, and who started it cannot ask the system for its
      processor time.
  """
  times, now = os.times(), time.perf_counter()
  used = {'wall': now, 'cpu': times.user + times.system} | {
    k: _found[k] for k in ('imports', 'compile')
  }
  record = {k: v - _reported.get(k, 0) for k, v in used.items()}
  _reported.update(used)
  with open(os.environ['TEST_TIMES'], 'a') as file:
    file.write(json.dumps(record | {'stays': stays}) + '\n')


_reported = {'wall': time.perf_counter()}

if os.environ.get('TEST_TIMES'):
  _time_imports()
  atexit.register(report)
