"""`python -m gsae_jax.store`, as users run it."""

import json
import shutil

import numpy as np
import pytest

from gsae_jax.activations.store import open_store
from tests.support.commands import files, refuse, run

pytestmark = pytest.mark.integration


@pytest.fixture
def store(smoke, tmp_path):
  shutil.copytree(smoke[0], tmp_path / 'store')
  return tmp_path / 'store'


def test_inspect_says_what_a_store_is(smoke, store):
  out = run('store', 'inspect', str(store))
  manifest = json.loads((store / 'manifest.json').read_text())
  for words in (
    manifest['content_hash'],
    'finished, 8 of 8 shards',
    '4,096 in shards of 512',
    '0.011 GB, 2,581 bytes a row',
    'lm_path       embedded',
    '"context_length": 32',
  ):
    assert words in out
  # Bytes a row are those on disk, but for checksums and records.
  on_disk = sum(len(v) for k, v in files(store).items() if '/c/' in k)
  assert 1 < on_disk / (2581 * 4096) < 1.05
  (line,) = (x for x in out.splitlines() if x.startswith('mlp_hidden.0'))
  site = open_store(str(store)).sites['mlp_hidden.0']
  _, width, dtype, centred, square, share = line.split()
  assert (width, dtype, centred) == ('512', 'float32', 'no')
  np.testing.assert_allclose(float(square), site.mean_squared_norm, rtol=1e-4)
  want = (site.mean_D**2).sum() / site.mean_squared_norm
  np.testing.assert_allclose(float(share), want, atol=6e-4)


def test_inspect_counts_what_an_unfinished_store_has(store):
  (store / 'records' / '5.json').unlink()
  assert '7 of 8 shards' in run('store', 'inspect', str(store))


def test_verify_and_repair_and_the_same_harvest(smoke, store):
  out = run('store', 'verify', str(store))
  assert '8 of 8 shards read, 0 bad files' in out
  path = store / 'mlp_hidden.0/activations/c/3/0'
  raw = bytearray(path.read_bytes())
  raw[70_000] ^= 16
  path.write_bytes(raw)
  (store / 'token_ids/c/6').unlink()
  before = files(store)
  out = run('store', 'verify', str(store), code=1)
  assert f'bad: shard 3: {store}/mlp_hidden.0/activations/c/3/0: ' in out
  assert f'bad: shard 6: {store}/token_ids/c/6: ' in out
  assert '8 of 8 shards read, 2 bad files' in out
  assert files(store) == before  # It only looked.
  out = run('store', 'verify', str(store), '--repair')
  assert 'deleted; run the same gsae_jax.harvest again' in out
  gone = before.keys() - files(store).keys()
  bad = 'mlp_hidden.0/activations/c/3/0'
  assert gone == {bad, 'records/3.json', 'records/6.json'}
  refuse(
    'train', f'--store={store}', f'--workdir={store}/x', match='is unfinished'
  )
  run('harvest', f'--store={store}')
  assert files(store) == files(smoke[0])


def test_stats_shows_norms(store):
  out = run('store', 'stats', str(store), '--rows=1000')
  lines = out.splitlines()
  (head,) = (x for x in lines if x.startswith('mlp_out.0'))
  assert '1,008 of 4,096 rows' in head  # Whole chunks.
  counts = [int(x.split()[2]) for x in lines[1:21] if x.startswith('  from')]
  assert len(counts) == 20 and sum(counts) == 1008
  opened = open_store(str(store))
  norms = np.linalg.norm(opened.read('mlp_out.0', 0, 4096), axis=1)
  median = float(head.split(': ')[-1].split(', ')[2])
  np.testing.assert_allclose(median, np.median(norms), rtol=0.05)


def test_mistakes_have_a_line(store, tmp_path):
  refuse('store', 'inspect', match='PATH is missing')
  refuse('store', 'look', str(store), match="'look' is not one of inspect, ver")
  refuse('store', 'verify', str(store), 'more', match="unexpected argument 'mo")
  refuse('store', 'inspect', str(store), '--repair', match='goes with verify')
  refuse('store', 'verify', str(store), '--rows=3', match='goes with stats')
  path = store / 'mlp_out.0/activations/c/3/0'
  path.write_bytes(path.read_bytes()[:-50])
  refuse('store', 'stats', str(store), match='mlp_out.0/activations/c/3/0')
  refuse('store', 'stats', str(tmp_path), match='no activation store at')
