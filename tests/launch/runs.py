"""A run as the door makes it, without a door."""

from etils import epath

from launch.package import Code
from launch.submission import Submission

CODE = Code('0123456789abcdef', 'c0ffee', ('a.py',), b'archive', b'diff')


def submission(run, **changes):
  values = {
    'run': epath.Path(run),
    'config': {'seed': 0, 'train': {'writers': []}},
    'config_flags': ('--config=c.py:arg', "--config.lm.path=it's"),
    'steps': ('harvest', 'train', 'evaluate'),
    'store': f'{run}/store',
    'allowed': (),
    'code': CODE,
  }
  return Submission(**values | changes)
