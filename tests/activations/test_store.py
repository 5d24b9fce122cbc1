"""The store: what is on disk, resuming, and the door."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from gsae_jax.activations import store as store_lib
from gsae_jax.activations.store import open_store
from gsae_jax.activations.writer import StoreWriter
from gsae_jax.errors import UserError

ROWS, SHARD, CHUNK, WIDTH = 1000, 256, 32, 8


def writer(path, **changes):
  values = {
    'identity': {'lm': {'weights': 'abc'}, 'seed': 0},
    'provenance': {'lm_path': 'x'},
    'widths': {'mlp_out.0': WIDTH, 'resid_post.1': WIDTH},
    'rows': ROWS,
    'shard_rows': SHARD,
    'chunk_rows': CHUNK,
    'dtype': 'bfloat16',
  }
  return StoreWriter(str(path), **values | changes)


def make_shard(shard):
  rng = np.random.default_rng(shard)
  n = min(SHARD, ROWS - shard * SHARD)
  x = rng.normal(size=(n, WIDTH)).astype(ml_dtypes.bfloat16)
  return {
    'token_ids': np.arange(n, dtype=np.int32) + shard * SHARD,
    'positions': np.arange(n, dtype=np.int32) % 7,
    'special': np.arange(n) % 5 == 0,
    'mlp_out.0': x,
    'resid_post.1': -x,
  }


def fill(path, **changes):
  return list(writer(path, **changes).run(make_shard))


def test_rows_come_back_with_their_statistics(tmp_path):
  assert fill(tmp_path) == [0, 256, 256, 256, 232]
  store = open_store(str(tmp_path))
  shards = [make_shard(s) for s in range(4)]
  for name in ('token_ids', 'positions', 'special'):
    want = np.concatenate([s[name] for s in shards])
    np.testing.assert_array_equal(store.array(name)[:].read().result(), want)
  want = np.concatenate([s['mlp_out.0'] for s in shards])
  got = store.array('mlp_out.0/activations')[:].read().result()
  assert got.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(got, want)
  site = store.sites['mlp_out.0']
  want = want.astype(np.float64)
  np.testing.assert_allclose(site.mean_D, want.mean(0), rtol=1e-12)
  np.testing.assert_allclose(
    site.mean_squared_norm, (want**2).sum(1).mean(), rtol=1e-12
  )
  assert store.rows == ROWS and site.width == WIDTH


def test_it_is_zarr3_in_shards(tmp_path):
  fill(tmp_path)
  folder = tmp_path / 'mlp_out.0' / 'activations'
  meta = json.loads((folder / 'zarr.json').read_text())
  assert meta['zarr_format'] == 3 and meta['shape'] == [ROWS, WIDTH]
  (codec,) = meta['codecs']
  assert codec['name'] == 'sharding_indexed'
  assert codec['configuration']['chunk_shape'] == [CHUNK, WIDTH]
  assert sorted(p.name for p in (folder / 'c').iterdir()) == list('0123')


def test_a_second_start_writes_only_what_is_missing(tmp_path):
  fill(tmp_path / 'whole')
  run = writer(tmp_path / 'cut').run(make_shard)
  next(run), next(run), next(run)  # Two shards, and then the process dies.
  run.close()
  with pytest.raises(UserError, match='unfinished; run the same'):
    open_store(str(tmp_path / 'cut'))
  # One array of shard 1 did not make it, and a lock file was left behind.
  site = tmp_path / 'cut' / 'resid_post.1' / 'activations' / 'c' / '1'
  (site / '0').unlink()
  (site / '0.__lock').touch()
  made = []
  list(writer(tmp_path / 'cut').run(lambda s: made.append(s) or make_shard(s)))
  assert made == [1, 2, 3]
  for path in sorted((tmp_path / 'whole').rglob('*')):
    if path.is_file():
      other = tmp_path / 'cut' / path.relative_to(tmp_path / 'whole')
      assert other.read_bytes() == path.read_bytes(), path
  assert list(writer(tmp_path / 'cut').run(make_shard)) == [ROWS]


def test_another_store_in_its_place_is_refused(tmp_path):
  fill(tmp_path)
  before = (tmp_path / 'manifest.json').read_bytes()
  other = {'lm': {'weights': 'def'}, 'seed': 0}
  with pytest.raises(UserError, match="identity.lm.weights is 'abc' there"):
    writer(tmp_path, identity=other)
  with pytest.raises(UserError, match='shard_rows is 256 there and 512 here'):
    writer(tmp_path, shard_rows=512)
  assert (tmp_path / 'manifest.json').read_bytes() == before


def test_a_lost_shard_is_an_error_and_not_zeros(tmp_path):
  fill(tmp_path)
  (tmp_path / 'mlp_out.0' / 'activations' / 'c' / '1' / '0').unlink()
  array = open_store(str(tmp_path)).array('mlp_out.0/activations')
  assert array[:256].read().result().shape == (256, WIDTH)
  with pytest.raises(ValueError, match='missing'):
    array[256:288].read().result()


def test_a_lost_array_is_named(tmp_path):
  fill(tmp_path)
  store = open_store(str(tmp_path))
  shutil.rmtree(tmp_path / 'mlp_out.0' / 'activations')
  with pytest.raises(UserError, match='has no readable mlp_out.0/activations'):
    store.array('mlp_out.0/activations')


def test_a_flipped_bit_is_an_error(tmp_path):
  fill(tmp_path)
  path = tmp_path / 'mlp_out.0' / 'activations' / 'c' / '2' / '0'
  raw = bytearray(path.read_bytes())
  raw[100] ^= 4
  path.write_bytes(raw)
  array = open_store(str(tmp_path)).array('mlp_out.0/activations')
  with pytest.raises(
    ValueError, match='DATA_LOSS.*shard entry.*Digest mismatch'
  ):
    array[512:768].read().result()


def test_stores_that_are_not_there_or_not_known(tmp_path):
  with pytest.raises(UserError, match='no activation store at'):
    open_store(str(tmp_path))
  fill(tmp_path)
  manifest = json.loads((tmp_path / 'manifest.json').read_text())
  store_lib.write_manifest(str(tmp_path), manifest | {'schema': 99})
  with pytest.raises(UserError, match='has schema 99, and this version reads'):
    open_store(str(tmp_path))
  del manifest['identity']
  store_lib.write_manifest(str(tmp_path), manifest)
  with pytest.raises(UserError, match="manifest.json lacks 'identity'"):
    open_store(str(tmp_path))
  (tmp_path / 'manifest.json').write_text('[]')
  with pytest.raises(UserError, match='manifest.json is not a manifest'):
    open_store(str(tmp_path))
  (tmp_path / 'manifest.json').write_text('{')
  with pytest.raises(UserError, match='manifest.json is not JSON'):
    open_store(str(tmp_path))


def test_a_place_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='--store: cannot write') as e:
    writer(tmp_path / 'file' / 'store')
  assert '\n' not in str(e.value)


def test_urls_become_tensorstore_specs():
  assert store_lib.kvstore_spec('gs://bucket/run/', 'mlp_out.0') == {
    'driver': 'gcs', 'bucket': 'bucket', 'path': 'run/mlp_out.0/'
  }  # fmt: skip
  assert store_lib.kvstore_spec('s3://bucket/a/b')['path'] == 'a/b/'
  spec = store_lib.kvstore_spec('/a/b', 'c')
  assert spec == {'driver': 'file', 'path': '/a/b/c/'}
  ts.KvStore.Spec(spec)


def test_differences_names_the_leaves():
  have = {'a': {'b': 1, 'c': [2]}, 'd': 3}
  want = {'a': {'b': 1, 'c': [4]}, 'e': 5}
  assert store_lib.differences(have, want) == [
    'a.c is [2] there and [4] here',
    'd is 3 there and None here',
    'e is None there and 5 here',
  ]
