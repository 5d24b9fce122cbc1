"""metrics.jsonl, TensorBoard and wandb."""

import json
import struct
import subprocess
import sys
import types

import numpy as np
import pytest

from gsae_jax import density
from gsae_jax.errors import UserError
from gsae_jax.training.records import read_metrics
from gsae_jax.training.tracking import Tracker, _Lines


def events(folder):
  """The events of a TensorBoard file, by the TFRecord format's own layout."""
  from tensorboardX.proto import event_pb2

  (path,) = folder.glob('events*')
  raw, at, found = path.read_bytes(), 0, []
  while at < len(raw):
    (length,) = struct.unpack_from('<Q', raw, at)
    found.append(event_pb2.Event.FromString(raw[at + 12 : at + 12 + length]))
    at += 16 + length
  return found


def test_scalars_reach_the_file_and_tensorboard(tmp_path):
  with Tracker(
    str(tmp_path), resumed_at=0, writers=('tensorboard',), config={}
  ) as tracker:
    one = {('a',): {'loss': np.float32(0.5)}}
    assert tracker.write(1, 128, one, {'tokens_per_second': 9.0}) == {}
    # One call late, so that no step is waited for.
    assert (tmp_path / 'metrics.jsonl').read_text() == ''
    # Of a stack, the members are in front.
    two = {('a', 'b'): {'loss': np.array([0.25, 2.0], np.float32)}}
    values = tracker.write(2, 256, two, {})
    assert values == {'a': {'loss': 0.5, 'step': 1}}
    values = tracker.flush()
    assert values == {
      'a': {'loss': 0.25, 'step': 2}, 'b': {'loss': 2.0, 'step': 2}
    }  # fmt: skip
    assert tracker.flush() == {}
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {'step': 1, 'tokens': 128, 'member': 'a', 'loss': 0.5},
    {'step': 1, 'tokens': 128, 'member': None, 'tokens_per_second': 9.0},
    {'step': 2, 'tokens': 256, 'member': 'a', 'loss': 0.25},
    {'step': 2, 'tokens': 256, 'member': 'b', 'loss': 2.0},
    {'step': 2, 'tokens': 256, 'member': None},
  ]
  assert {
    (value.tag, event.step): value.simple_value
    for event in events(tmp_path / 'tensorboard')
    for value in event.summary.value
  } == {
    ('a/loss', 1): 0.5,
    ('run/tokens_per_second', 1): 9.0,
    ('a/loss', 2): 0.25,
    ('b/loss', 2): 2.0,
  }


@pytest.mark.integration
def test_tensorboard_takes_no_torch_along(tmp_path):
  pytest.importorskip('torch')
  code = (
    'import sys; from gsae_jax.training import tracking as t\n'
    't._TensorBoard(t.epath.Path(sys.argv[1]), 0).write(1, {"a": 1.0})\n'
    'assert "torch" not in sys.modules; import torch'
  )
  subprocess.run([sys.executable, '-c', code, str(tmp_path)], check=True)
  assert list(tmp_path.iterdir())


@pytest.mark.parametrize('resumed_at', [0, 5])
def test_tensorboard_forgets_what_came_after_the_checkpoint(
  resumed_at, tmp_path
):
  with Tracker(
    str(tmp_path), resumed_at=resumed_at, writers=('tensorboard',), config={}
  ):
    pass
  written = events(tmp_path / 'tensorboard')
  starts = [e.step for e in written if e.HasField('session_log')]
  assert starts == [resumed_at + 1]


def test_what_is_not_a_number_is_told_and_not_written(tmp_path):
  nan = float('nan')
  with Tracker(str(tmp_path), resumed_at=0, writers=(), config={}) as tracker:
    metrics = {
      ('a', 'b'): {'loss': np.array([1.0, nan]), 'gamma': np.array([nan, 1.0])}
    }
    tracker.write(7, 70, metrics, {})
    assert np.isnan(tracker.flush()['b']['loss'])
    tracker.stop({'step': 7, 'member': 'b', 'stopped': 'why'})
    tracker.write(8, 80, metrics, {})
    assert tracker.flush().keys() == {'a'}
  kept = [r for r in read_metrics(tmp_path / 'metrics.jsonl') if r['member']]
  assert kept == [
    {'step': 7, 'tokens': 70, 'member': 'a', 'loss': 1.0, 'gamma': None},
    {'step': 7, 'member': 'b', 'stopped': 'why'},
    {'step': 8, 'tokens': 80, 'member': 'a', 'loss': 1.0, 'gamma': None},
  ]


def test_densities_reach_the_file_and_tensorboard(tmp_path):
  fired = np.array([0, 0, 1, 10, 31, 32, 100])
  densities = density.histogram(fired, 100)
  with Tracker(
    str(tmp_path), resumed_at=0, writers=('tensorboard',), config={}
  ) as tracker:
    tracker.histogram({'step': 4, 'tokens': 9, 'member': 'a'}, densities)
  (record,) = read_metrics(tmp_path / 'metrics.jsonl')
  found = record.pop('density')
  assert record == {'step': 4, 'tokens': 9, 'member': 'a'}
  assert found['rows'] == 100 and found['never'] == 2
  bins = dict(zip(found['log10_edges'], found['features'], strict=False))
  # 31 of 100 is below 10^-0.5, 32 is above; everything is in the last bin.
  assert {k: v for k, v in bins.items() if v} == {-2: 1, -1: 2, -0.5: 2}
  (event,) = [e for e in events(tmp_path / 'tensorboard') if e.step == 4]
  (value,) = event.summary.value
  assert value.tag == 'a/log10_density'
  assert sum(value.histo.bucket) == 5 and value.histo.num == 5


def test_a_bad_line_is_an_error_unless_it_is_the_torn_last_one(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  good = '{"step": 1, "member": "a"}'
  for torn in ('{"step": 2, "mem', '', '{}'):
    path.write_text(f'{good}\n{torn}')
    assert read_metrics(path) == [{'step': 1, 'member': 'a'}]
  path.write_bytes(f'{good}\n'.encode() + b'\xff')
  assert read_metrics(path) == [{'step': 1, 'member': 'a'}]
  for bad in (
    '{"step": 2, "mem', '{}', '[]', '{"step": "2", "member": "a"}',
    '{"step": 2, "member": 3}', '[' * 100_000,
  ):  # fmt: skip
    path.write_text(f'{bad}\n{good}\n')
    with pytest.raises(
      UserError, match='line 1 of .*metrics.jsonl is not a rec'
    ):
      Tracker(str(tmp_path), resumed_at=0, writers=(), config={})
    assert path.read_text() == f'{bad}\n{good}\n'


def test_lines_on_storage_that_cannot_append_are_written_whole(
  tmp_path, monkeypatch
):
  path = tmp_path / 'metrics.jsonl'
  monkeypatch.setattr('gsae_jax.paths.is_remote', lambda path: True)
  lines = _Lines(path, [{'step': 1}])
  lines.write({'step': 2})
  assert path.read_text() == '{"step": 1}\n'
  lines.sync()
  lines.write({'step': 3})
  lines.close()
  assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_wandb_gets_the_same_scalars(tmp_path, monkeypatch):
  calls, ids = [], []
  run = types.SimpleNamespace(
    log=lambda scalars, step: calls.append((step, scalars)),
    finish=lambda: calls.append('finish'),
  )
  fake = types.ModuleType('wandb')
  fake.Histogram = dict
  fake.Error = RuntimeError
  fake.init = lambda **k: (
    calls.append((k['name'], k['config'])) or (ids.append(k['id']) or run)
  )
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  with Tracker(
    str(tmp_path / 'run7'), resumed_at=0, writers=('wandb',), config={'seed': 1}
  ) as tracker:
    tracker.write(3, 0, {('a',): {'loss': 0.5}}, {'tokens_per_second': 7.0})
  assert calls == [
    ('run7', {'seed': 1}),
    (3, {'a/loss': 0.5}),
    (3, {'run/tokens_per_second': 7.0}),
    'finish',
  ]
  for folder in ('run7', 'other/run7'):  # Only the same folder is the same run.
    with Tracker(
      str(tmp_path / folder), resumed_at=0, writers=('wandb',), config={}
    ):
      pass
  assert ids[0] == ids[1] != ids[2]

  def refuse(**kwargs):
    raise RuntimeError('No API key configured')

  fake.init = refuse
  with pytest.raises(
    UserError, match='No API key configured; run `wandb login'
  ):
    Tracker(str(tmp_path / 'x'), resumed_at=0, writers=('wandb',), config={})
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(UserError, match="'wandb' is not installed; pip install"):
    Tracker(str(tmp_path / 'x'), resumed_at=0, writers=('wandb',), config={})


@pytest.mark.integration
def test_wandb_without_a_network(tmp_path, monkeypatch):
  # What the real package keeps is asked of its public summary: the file that it
  # writes offline is of a format of its own, which changes between releases.
  wandb = pytest.importorskip('wandb')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  runs, init = [], wandb.init
  monkeypatch.setattr(
    wandb, 'init', lambda **kwargs: runs.append(init(**kwargs)) or runs[-1]
  )
  with Tracker(
    str(tmp_path / 'run7'), resumed_at=0, writers=('wandb',), config={'seed': 1}
  ) as tracker:
    log = lambda step, *values: tracker.write(
      step, 9, {('a', 'b'): {'loss': np.array(values)}}, {}
    )
    log(1, 0.5, 0.25), log(2, 0.25, 0.125), tracker.flush()
    densities = density.histogram(np.array([0, 1, 5]), 10)
    tracker.histogram({'step': 2, 'tokens': 9, 'member': 'a'}, densities)
    log(3, 9.0, 9.0), tracker.flush()  # Only then is step 2 complete.
    (run,) = runs
    assert run.config['seed'] == 1 and run.step == 3
    found = run.summary
    assert (found['a/loss'], found['b/loss']) == (0.25, 0.125)
    kept = found['a/log10_density']
    assert list(kept['values']) == densities['features']
  (path,) = (tmp_path / 'run7' / 'wandb').glob('offline-run-*/*.wandb')
  assert path.stat().st_size > 0
