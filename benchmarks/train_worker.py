"""One side of `train_step`, as a process of its own."""

import json
import sys

from benchmarks import turns
from benchmarks.settings import Settings

PEERS = ('saelens', 'dictionary_learning', 'torch')
OURS = ('dense', 'sparse')


def make(name: str, settings: Settings, folder: str) -> turns.Side:
  """Builds a side; imports no more than it needs."""
  if name in PEERS:
    from benchmarks import peers

    return peers.make(name, settings, folder)
  from benchmarks import ours

  return ours.make_step(name, settings, folder)


if __name__ == '__main__':
  which, told, place = sys.argv[1:]
  turns.serve(lambda: make(which, Settings(**json.loads(told)), place))
