"""Benchmarks: sides by turns, what is recorded of them, and the real command."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import comparison, record, synthetic, turns
from tests.support.commands import check_refusal, run_process, start

CORE = min(os.sched_getaffinity(0))
TINY = (
  '--width=16', '--features=64', '--batch=32', '--l0=4', '--rounds=3',
  f'--core={CORE}',
)  # fmt: skip

WORKER = """
import os, sys, time
from benchmarks import turns

def make():
  done = [0]
  def run():
    done[0] += 1
    print('not an answer', flush=True)
    if done[0] == {fails_at}:
      raise ValueError('out of something')
    time.sleep({seconds})
  return turns.Side(run, {{'threads': os.environ.get('OMP_NUM_THREADS'),
    'cores': sorted(os.sched_getaffinity(0))}}, lambda: {{'done': done[0]}})

turns.serve(make)
"""


def worker(*, seconds=0.0, fails_at=0):
  source = WORKER.format(seconds=seconds, fails_at=fails_at)
  return [sys.executable, '-c', source]


def train_step(results, *flags, **kwargs):
  place = f'--results={results}'
  return run_process(
    'train_step',
    *TINY,
    place,
    *flags,
    package='benchmarks',
    config=None,
    **kwargs,
  )


@pytest.mark.integration
def test_sides_take_turns_and_one_that_dies_is_left_out():
  commands = {
    'slow': worker(seconds=0.05),
    'dies': worker(fails_at=2),
    'quick': worker(),
    'never': [sys.executable, '-c', 'raise SystemExit("error: no such thing")'],
  }
  found, failed, busy = turns.measure(commands, rounds=3, core=None)
  assert busy is None
  assert list(found) == ['slow', 'quick']
  assert failed == {
    'dies': 'ValueError: out of something',
    'never': 'error: no such thing',
  }
  for side in found.values():
    assert side['done'] == len(side['turns']) == 3
    assert side['turns'] == side['wall'] and side['peak_bytes'] > 2**20
  assert all(t >= 0.05 for t in found['slow']['turns'])
  rows = comparison.make_rows(found, tokens=10)
  ratio = rows[1]['times_as_fast_as']['slow']
  rounds = zip(found['slow']['turns'], found['quick']['turns'], strict=True)
  np.testing.assert_allclose(
    ratio['median'], np.median([a / b for a, b in rounds])
  )


@pytest.mark.integration
def test_on_a_core_the_processor_counts():
  found, _, busy = turns.measure(
    {'a': worker(seconds=0.1)}, rounds=2, core=CORE
  )
  assert busy is None if os.cpu_count() == 1 else 0 <= busy <= 1
  side = found['a']
  assert side['threads'] == '1' and side['cores'] == [CORE]
  assert max(side['turns']) < 0.05 and min(side['wall']) >= 0.1


def test_rows_compare_by_tokens_and_with_the_peak():
  clocks = lambda *t: {'turns': list(t), 'wall': list(t), 'peak_bytes': 2**21}
  found = {
    'a': clocks(1.0, 2.0, 4.0) | {'flops': 4e9},
    'b': clocks(2.0, 2.0, 4.0) | {'tokens': 30, 'versions': {}},
    'matmul': clocks(1.0, 1.0, 1.0) | {'flops': 8e9},
  }
  a, b, peak = comparison.make_rows(found, tokens=20, times=2, unit=1e9)
  assert a['step'] == {'median': 1e3, 'quartiles': [750, 1500], 'unit': 'ms'}
  assert a['units'] == 4 and a['rate']['median'] == 4
  assert peak['rate']['median'] == 16 and a['share_of_peak'] == 0.25
  assert a['speed']['median'] == 20 and b['speed']['median'] == 30
  assert a['times_as_fast_as']['a']['quartiles'] == [1, 1]
  # 40, 20, 10 tokens a second over 30, 30, 15.
  assert a['times_as_fast_as']['b']['median'] == 2 / 3
  assert b['times_as_fast_as']['a']['median'] == 1.5
  assert a['peak_memory'] == {'value': 2.0, 'unit': 'MiB'}
  assert 'speed' not in peak and 'rate' not in b and 'versions' not in b
  table = comparison.table([a, b, peak], ['b']).splitlines()
  assert table[2].startswith('| a | 4.00 | 1,000.0 (750.0 to 1,500.0) | 20 ')
  assert len({line.count('|') for line in table}) == 1


def test_synthetic_gates_are_as_open_as_asked(tmp_path):
  x_ND = synthetic.activations(1024, 24)
  np.testing.assert_allclose(np.mean(np.sum(x_ND**2, 1)), 24, rtol=1e-5)
  for l0, bound in ((0, (50, 78)), (8, (7.9, 8.1))):
    params = synthetic.parameters(x_ND, 128, l0)
    np.testing.assert_allclose(
      np.linalg.norm(params['W_dec'], axis=1), 1, rtol=1e-6
    )
    synthetic.write(str(tmp_path), x_ND, params)
    again, params = synthetic.read(str(tmp_path))
    np.testing.assert_array_equal(again, x_ND)
    assert bound[0] < synthetic.open_gates(params, x_ND) < bound[1]


@pytest.mark.integration
def test_the_step_starts_alike_on_all_sides_and_adds_a_line(tmp_path):
  sides = ['dense']
  if importlib.util.find_spec('torch'):
    sides.append('torch')
  (tmp_path / 'train_step.jsonl').write_text('{"before": 1}\n')
  printed = train_step(
    tmp_path,
    f'--sides={",".join(sides)}',
    f'--peers_python={sys.executable}',
  )
  lines = (tmp_path / 'train_step.jsonl').read_text().splitlines()
  assert len(lines) == 2 and json.loads(lines[0]) == {'before': 1}
  found = json.loads(lines[1])
  assert (
    found['settings']['features'] == 64 and found['settings']['rounds'] == 3
  )
  assert found['hardware']['cores'] == os.cpu_count()
  assert {'python', 'jax', 'jaxlib'} <= found['versions'].keys()
  assert found['failed'] == {} and {'date', 'commit'} <= found.keys()
  rows = {row['name']: row for row in found['rows']}
  assert list(rows) == [*sides, 'matmul']
  # The compiler counts activations and the optimizer, too, which are not small here.
  assert 7 < rows['dense']['units'] < 12
  assert rows['dense']['metrics']['loss'] > 0
  for name in sides:
    row = rows[name]
    assert f'| {name} |' in printed
    assert row['times_as_fast_as'][name]['quartiles'] == [1, 1]
    assert row['times_as_fast_as'][name]['median'] == 1
    np.testing.assert_allclose(
      row['first_loss'], rows['dense']['first_loss'], rtol=1e-5
    )
    assert abs(row['l0'] - found['l0_at_start']) < 0.2
    assert 3.5 < found['l0_at_start'] < 4.5
    low, high = row['step']['quartiles']
    assert 0 < low <= row['step']['median'] <= high
    assert row['peak_memory']['value'] > 50
  if 'torch' in rows:
    assert 7 <= rows['torch']['units'] < 7.5
    assert found['versions']['peers']['torch']


@pytest.mark.integration
@pytest.mark.parametrize(
  ('flag', 'match'),
  [
    ('--sides=dense,gold', "there is no 'gold'"),
    ('--peers_python=nowhere/python', '--peers_python'),
  ],
)
def test_mistakes_are_one_line(flag, match):
  process = start('train_step', flag, package='benchmarks', config=None)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 1
  check_refusal(err, match)


@pytest.mark.integration
def test_code_that_was_changed_is_said_to_be(tmp_path):
  found = record.append(str(tmp_path / 'new'), 'x', settings={}, rows=[])
  (line,) = (tmp_path / 'new' / 'x.jsonl').read_text().splitlines()
  assert json.loads(line) == found
  head = subprocess.run(
    ['git', 'rev-parse', 'HEAD'],
    cwd=record.ROOT,
    capture_output=True,
    text=True,
  ).stdout.strip()
  assert found['commit'] == (head or None)
