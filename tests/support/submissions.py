"""A run as the door makes it, without a door."""

from etils import epath

from launch import specs
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


def spec(topology='v5e:4x4', **changes):
  values = {
    'project': 'my-project',
    'zone': 'us-west4-a',
    'slice': specs.parse_slice(topology, '--topology'),
    'slices': 1,
    'spot': False,
    'runtime': 'v2-alpha-tpuv5-lite',
    'service_account': None,
    'network': None,
    'valid_hours': None,
  }
  return specs.TpuSpec(**values | changes)
