"""What a run shows, and what it says of itself."""

import itertools
import sys

import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.activations.loader import Loader
from gsae_jax.training.progress import Progress
from gsae_jax.training.records import read_metrics
from tests.support.training import member, mesh_of, settings, train

VALUES = {'a': {'loss': 1.0, 'l0': 10.0}, 'b': {'loss': 3.0, 'l0': 20.0}}


def show(terminal, monkeypatch, capsys):
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: terminal)
  with Progress(first=100, steps=500, batch_size=8) as progress:
    for _ in range(400):
      progress.update()
      progress.show(VALUES)
  return capsys.readouterr().err


def test_plain_lines_where_there_is_no_terminal(monkeypatch, capsys):
  lines = show(False, monkeypatch, capsys).splitlines()
  assert len(lines) == 16  # One in twenty of the whole run.
  assert lines[1].startswith('step 126 of 500: ')
  assert all(s.endswith(' tokens/s, mean loss 2, mean L0 15.0') for s in lines)


def test_a_bar_on_terminals(monkeypatch, capsys):
  shown = show(True, monkeypatch, capsys)
  assert '500/500' in shown and 'step 1' not in shown
  assert 'mean loss 2, mean L0 15.0' in shown


def test_rates_are_of_the_time_since_the_last_call(monkeypatch):
  times = itertools.count(step=2)
  monkeypatch.setattr(
    'gsae_jax.training.progress.time.monotonic', lambda: next(times)
  )
  progress = Progress(first=0, steps=100, batch_size=10)
  progress.update()
  first = progress.rates(600)
  for _ in range(3):
    progress.update()
  second = progress.rates(700)
  progress.__exit__()
  assert (first['tokens_per_second'], first['read_bytes_per_second']) == (
    5,
    300,
  )
  assert (second['tokens_per_second'], second['read_bytes_per_second']) == (
    15,
    50,
  )
  assert 5e7 < second['host_memory_bytes'] < 1e11


@pytest.mark.integration
def test_a_run_says_how_fast_it_is(store, tmp_path):
  train(store, tmp_path, (member(),), settings(steps=6, log_every=2))
  rates = [
    r for r in read_metrics(tmp_path / 'metrics.jsonl') if r['member'] is None
  ]
  assert [r['step'] for r in rates] == [2, 4, 6]
  for r in rates:
    assert r['tokens_per_second'] > 0
    assert r['tokens'] == 128 * r['step']


def test_bytes_read_are_those_that_arrived(store):
  loader = Loader(
    store, ('mlp_out.0',), batch_size=128, seed=0, unit='chunk',
    shuffle_rows=256,
  )  # fmt: skip
  assert loader.bytes_read == 0
  batches = loader.batches(NamedSharding(mesh_of(), P('data')), start=0)
  for _ in range(8):  # Four rounds of two batches; the fifth is on its way.
    next(batches)
  row = 16 * np.dtype(np.float32).itemsize
  assert 4 * 256 * row <= loader.bytes_read <= 5 * 256 * row
