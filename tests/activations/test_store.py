"""The store: what is on disk, resuming, and the door."""

import json
import shutil
import subprocess
import types

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from gsae_jax.activations import layout, shards
from gsae_jax.activations import store as store_lib
from gsae_jax.activations.store import open_store
from gsae_jax.activations.verify import Verifier
from gsae_jax.errors import UserError
from tests.support.activations import (
  CHUNK,
  DAMAGES,
  ROWS,
  SHARD,
  SITES,
  WIDTH,
  fill,
  make_rows,
  put,
  writer,
)  # fmt: skip
from tests.support.commands import files


def read(store, name):
  return store.array(name)[:].read().result()


def test_rows_come_back_with_their_statistics(whole):
  store = open_store(str(whole))
  want = make_rows(0, ROWS)
  for name in layout.ROW_ARRAYS:
    got = read(store, name)
    np.testing.assert_array_equal(got, want[name])
    assert got.dtype == want[name].dtype
  x = read(store, 'mlp_out.0/activations')
  assert x.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(x, want['mlp_out.0'])
  x = x.astype(np.float64)
  site = store.sites['mlp_out.0']
  np.testing.assert_allclose(site.mean_D, x.mean(0), rtol=1e-12)
  np.testing.assert_allclose(
    site.mean_norm, np.linalg.norm(x, axis=1).mean(), rtol=1e-12
  )
  np.testing.assert_allclose(
    site.mean_squared_norm, (x**2).sum(1).mean(), rtol=1e-12
  )
  assert store.rows == ROWS and site.width == WIDTH and site.encoding is None


def test_a_removed_mean_is_put_back(tmp_path):
  fill(tmp_path, centred=True)
  store = open_store(str(tmp_path))
  site = store.sites['resid_post.1']
  stored = read(store, 'resid_post.1/activations')
  np.testing.assert_array_equal(stored, make_rows(0, ROWS)['resid_post.1'])
  x = site.encoding.decode(stored)
  want = stored.astype(np.float32) / 2 + np.linspace(-40, 40, WIDTH)
  np.testing.assert_allclose(x, want, rtol=1e-6)
  np.testing.assert_array_equal(store.read('resid_post.1', 30, 99), x[30:99])
  # Statistics are those of the activations.
  np.testing.assert_allclose(site.mean_D, x.mean(0, np.float64), rtol=1e-6)
  np.testing.assert_allclose(
    site.mean_squared_norm, (x.astype(np.float64) ** 2).sum(1).mean(), rtol=1e-6
  )


def test_it_is_zarr3_in_shards_with_checksums(whole):
  folder = whole / 'mlp_out.0' / 'activations'
  meta = json.loads((folder / 'zarr.json').read_text())
  assert meta['zarr_format'] == 3 and meta['shape'] == [ROWS, WIDTH]
  (codec,) = meta['codecs']
  assert codec['name'] == 'sharding_indexed'
  assert codec['configuration']['chunk_shape'] == [CHUNK, WIDTH]
  for part in ('codecs', 'index_codecs'):
    assert codec['configuration'][part][-1]['name'] == 'crc32c'
  assert sorted(p.name for p in (folder / 'c').iterdir()) == list('0123')


def test_a_second_start_writes_only_what_is_missing(tmp_path, whole):
  with writer(tmp_path) as w:
    put(w, 0), put(w, 1), w.flush()
  with pytest.raises(UserError, match='unfinished; run the same'):
    open_store(str(tmp_path))
  # One array of shard 1 did not make it, and a lock file was left behind.
  site = tmp_path / 'resid_post.1' / 'activations' / 'c' / '1'
  (site / '0').unlink()
  (site / '0.__lock').touch()
  assert fill(tmp_path) == [1, 2, 3]
  assert files(tmp_path) == files(whole)
  assert fill(tmp_path) == []
  assert files(tmp_path) == files(whole)


def test_the_size_of_the_buffer_does_not_change_the_files(tmp_path, whole):
  # Only what is missing of a buffer is written.
  with writer(tmp_path) as w:
    put(w, 2), w.flush()
  before = (tmp_path / 'records/2.json').stat().st_mtime_ns
  assert fill(tmp_path, buffer_rows=2 * SHARD) == [0, 1]
  assert (tmp_path / 'records/2.json').stat().st_mtime_ns == before
  assert files(tmp_path) == files(whole)


def test_a_shard_of_zeros_is_a_shard(tmp_path):
  zeros = {k: np.zeros_like(v) for k, v in make_rows(0, ROWS).items()}
  with writer(tmp_path, buffer_rows=4 * SHARD) as w:
    w.put(0, zeros), w.flush(), w.finish()
  assert fill(tmp_path) == []
  assert (tmp_path / 'special/c/3').exists()
  assert not open_store(str(tmp_path)).read('mlp_out.0', 0, ROWS).any()


def test_two_writers_of_one_shard_do_no_harm(tmp_path, whole):
  with writer(tmp_path) as a, writer(tmp_path) as b:
    for buffer in range(4):
      put(a, buffer), put(b, buffer)
    a.flush(), b.flush()
    a.finish(), b.finish()
  assert files(tmp_path) == files(whole)


def test_a_shard_is_finished_when_its_record_is_there(tmp_path):
  fill(tmp_path)
  (tmp_path / 'records' / '3.json').unlink()
  with writer(tmp_path) as w:
    assert w.missing_buffers() == [3]
  with pytest.raises(UserError, match='unfinished'):  # Again, until it is.
    open_store(str(tmp_path))


@pytest.mark.parametrize('damage', DAMAGES, ids=lambda f: f.__name__)
def test_harvest_writes_bad_shards_again_and_no_other(damage, tmp_path, whole):
  fill(tmp_path)
  other = {'lm': {'weights': 'def'}, 'seed': 0}
  fill(tmp_path / 'foreign', identity=other, salt=1)
  damage(tmp_path, whole)
  shutil.rmtree(tmp_path / 'foreign')
  assert fill(tmp_path) == [2]
  assert files(tmp_path) == files(whole)


def test_a_damaged_last_shard_is_written_again(tmp_path, whole):
  # It is not full: TensorStore would read it to write a part of it.
  fill(tmp_path)
  file = tmp_path / 'mlp_out.0/activations/c/3/0'
  file.write_bytes(file.read_bytes()[:-100])
  assert fill(tmp_path) == [3]
  assert files(tmp_path) == files(whole)


def test_another_store_in_its_place_is_refused(tmp_path):
  fill(tmp_path)
  before = files(tmp_path)
  other = {'lm': {'weights': 'def'}, 'seed': 0}
  with pytest.raises(UserError, match="identity.lm.weights is 'abc' there"):
    writer(tmp_path, identity=other)
  with pytest.raises(UserError, match='shard_rows is 256 there and 512 here'):
    writer(tmp_path, shard_rows=512)
  assert files(tmp_path) == before


def test_the_manifest_of_another_store_does_not_claim_its_shards(tmp_path):
  fill(tmp_path)
  other = {'lm': {'weights': 'def'}, 'seed': 0}
  fill(tmp_path / 'other', identity=other, salt=1)
  shutil.move(tmp_path / 'other' / 'manifest.json', tmp_path / 'manifest.json')
  shutil.rmtree(tmp_path / 'other')
  before = files(tmp_path)
  with pytest.raises(UserError, match='every shard there is of another store'):
    writer(tmp_path, identity=other)
  with pytest.raises(UserError, match="weights is 'def' there and 'abc' here"):
    writer(tmp_path)
  assert files(tmp_path) == before


def test_of_two_manifests_the_first_stays(tmp_path):
  none = layout.open_kvstore(str(tmp_path)).read('manifest.json').result()
  write = lambda number: layout.write_manifest(
    str(tmp_path), {'schema': number}, over=none.stamp.generation
  )
  assert write(1) and not write(2)
  assert json.loads((tmp_path / 'manifest.json').read_text())['schema'] == 1


def test_a_store_that_is_being_repaired_is_not_finished(tmp_path, monkeypatch):
  fill(tmp_path)
  (tmp_path / 'records/2.json').unlink()
  listed = shards.listed

  def meanwhile(*args):  # Somebody begins a repair behind our back.
    found = listed(*args)
    Verifier(str(tmp_path)).repair([])
    return found

  with writer(tmp_path) as w:
    put(w, 2), w.flush()
    monkeypatch.setattr(shards, 'listed', meanwhile)
    with pytest.raises(UserError, match='somebody else changed the manifest'):
      monkeypatch.setattr(
        Verifier, '__init__', lambda self, path: vars(self).update(
          path=path, manifest=layout.read_manifest(path) | {'rows': 999},
          _kv=layout.open_kvstore(path),
        ),
      )  # fmt: skip
      w.finish()


def test_a_lost_shard_is_an_error_and_not_zeros(tmp_path):
  fill(tmp_path)
  (tmp_path / 'mlp_out.0' / 'activations' / 'c' / '1' / '0').unlink()
  array = open_store(str(tmp_path)).array('mlp_out.0/activations')
  assert array[:256].read().result().shape == (256, WIDTH)
  with pytest.raises(ValueError, match='missing'):
    array[256:288].read().result()


def test_rows_are_read_only_when_they_are_what_was_written(tmp_path):
  fill(tmp_path)
  store = open_store(str(tmp_path))
  want = make_rows(0, ROWS)['mlp_out.0']
  for first, last in ((0, 5), (30, 70), (250, 300), (0, ROWS), (970, ROWS)):
    np.testing.assert_array_equal(
      store.read('mlp_out.0', first, last), want[first:last]
    )
  place = tmp_path / 'mlp_out.0/activations/c'
  shutil.copy(place / '1/0', place / '2/0')
  store.read('mlp_out.0', 0, 512)
  with pytest.raises(UserError, match='c/2/0: its rows are not those'):
    store.read('mlp_out.0', 510, 514)


def test_harvest_repairs_metadata_of_an_array(tmp_path, whole):
  for change in (lambda t: t.replace('bfloat16', 'float16'), lambda t: t[:9]):
    fill(tmp_path)
    meta = tmp_path / 'mlp_out.0' / 'activations' / 'zarr.json'
    meta.write_text(change(meta.read_text()))
    assert fill(tmp_path) == []
    assert files(tmp_path) == files(whole)


def test_a_single_foreign_shard_is_written_again(tmp_path):
  for name, seed in (('ours', 0), ('theirs', 1)):
    with writer(tmp_path / name, identity={'seed': seed}) as w:
      put(w, 0, salt=seed), w.flush()
  shutil.copytree(
    tmp_path / 'theirs', tmp_path / 'ours', dirs_exist_ok=True,
    ignore=lambda folder, names: ['manifest.json'],
  )  # fmt: skip
  assert fill(tmp_path / 'ours', identity={'seed': 0}) == [0, 1, 2, 3]


def test_activations_that_are_not_finite_are_refused(tmp_path):
  rows = make_rows(0, SHARD)
  rows['mlp_out.0'][7, 3] = np.nan
  with writer(tmp_path) as w:
    w.put(0, rows)
    with pytest.raises(UserError, match='mlp_out.0 are not all finite'):
      w.flush()
  assert not list((tmp_path / 'records').glob('*'))


def test_a_lost_or_changed_array_is_named(tmp_path):
  fill(tmp_path)
  store = open_store(str(tmp_path))
  meta = tmp_path / 'mlp_out.0' / 'activations' / 'zarr.json'
  meta.write_text(meta.read_text().replace('bfloat16', 'float16'))
  with pytest.raises(UserError, match='mlp_out.0/activations/ is not a read'):
    store.array('mlp_out.0/activations')
  shutil.rmtree(tmp_path / 'mlp_out.0' / 'activations')
  with pytest.raises(UserError, match='mlp_out.0/activations/ is not a read'):
    store.array('mlp_out.0/activations')


def test_stores_that_are_not_there_or_not_known(tmp_path):
  with pytest.raises(UserError, match='no activation store at'):
    open_store(str(tmp_path))
  for place in (
    'http://somewhere',
    'gs://',
    's3:///x',
    'gs:/bucket/x',
    'ftp:x',
  ):
    with pytest.raises(UserError, match=f'{place} is not a place; give a fold'):
      open_store(place)
  with pytest.raises(UserError, match='--store is empty'):
    open_store('')
  fill(tmp_path)
  path = tmp_path / 'manifest.json'
  text = path.read_text()
  manifest = json.loads(text)
  layout.write_manifest(str(tmp_path), manifest | {'schema': 99})
  with pytest.raises(UserError, match='has schema 99, and this version reads'):
    open_store(str(tmp_path))
  path.write_text(text.replace('"seed": 0', '"seed": 1'))
  with pytest.raises(UserError, match='was changed after it was written'):
    open_store(str(tmp_path))
  del manifest['digest']
  layout.write_manifest(str(tmp_path), manifest | {'identity': {'seed': 1}})
  with pytest.raises(UserError, match='content hash is not that of its conte'):
    open_store(str(tmp_path))
  del manifest['widths']
  layout.write_manifest(str(tmp_path), manifest)
  with pytest.raises(UserError, match="manifest.json lacks 'widths'; put the"):
    open_store(str(tmp_path))
  for bad, match in (('[]', 'is not a manifest'), ('{', 'is not JSON')):
    path.write_text(bad)
    with pytest.raises(UserError, match=f'manifest.json {match}'):
      open_store(str(tmp_path))


def test_a_place_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='--store: cannot') as e:
    writer(tmp_path / 'file' / 'store')
  assert '\n' not in str(e.value)


def test_a_disk_that_is_too_small_is_refused_before_the_work(
  tmp_path, monkeypatch
):
  free = types.SimpleNamespace(free=20_000)  # One shard less than it takes.
  monkeypatch.setattr('shutil.disk_usage', lambda path: free)
  with pytest.raises(UserError, match='has 0.00 GB free, and the shards still'):
    writer(tmp_path)
  free.free = 10**6
  with writer(tmp_path) as w:
    put(w, 0), w.flush()
  free.free = 40_000  # Enough for what is left.
  with writer(tmp_path):
    pass


def test_a_write_that_fails_names_the_shard_and_loses_nothing(tmp_path, whole):
  # A folder in the file's place stops root, too.
  obstacle = tmp_path / 'resid_post.1/activations/c/1/0/obstacle'
  with writer(tmp_path) as w:
    obstacle.mkdir(parents=True)
    with pytest.raises(UserError, match='cannot write shard 1 of .*goes on'):
      for buffer in range(4):
        put(w, buffer)
      w.flush()
  shutil.rmtree(obstacle.parent)
  made = fill(tmp_path)
  assert 1 in made and 0 not in made
  assert files(tmp_path) == files(whole)


@pytest.fixture
def small_disk(tmp_path):
  """A function that mounts a file system of its own, or changes it."""
  place = tmp_path / 'disk'
  place.mkdir()

  def mount(options):
    command = ['mount', '-t', 'tmpfs', '-o', options, 'none', str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      pytest.skip(f'needs to mount a file system: {done.stderr.strip()}')

  mount('size=64k')
  yield place, mount
  subprocess.run(['umount', str(place)], check=True)


def test_a_full_disk_is_named_and_a_larger_one_goes_on(
  small_disk, whole, monkeypatch
):
  place, mount = small_disk
  plenty = types.SimpleNamespace(free=10**9)  # Others fill it meanwhile.
  monkeypatch.setattr('shutil.disk_usage', lambda path: plenty)
  with pytest.raises(UserError, match='cannot write.*No space left on device'):
    fill(place)
  mount('remount,size=4m')
  made = fill(place)
  assert files(place) == files(whole) and 3 in made


def test_a_lost_permission_is_named_and_nothing_is_lost(small_disk, whole):
  place, mount = small_disk
  mount('remount,size=4m')
  with writer(place) as w:
    put(w, 0), w.flush()
    mount('remount,ro')
    put(w, 1)
    with pytest.raises(UserError, match='cannot write shard 1.*Read-only file'):
      w.flush()
  assert Verifier(str(place)).there == [0]  # It can still be looked at.
  mount('remount,rw')
  assert fill(place) == [1, 2, 3]
  assert files(place) == files(whole)


def test_urls_become_tensorstore_specs(monkeypatch):
  assert layout.kvstore_spec('gs://bucket/run/', 'mlp_out.0') == {
    'driver': 'gcs', 'bucket': 'bucket', 'path': 'run/mlp_out.0/'
  }  # fmt: skip
  assert layout.kvstore_spec('s3://bucket/a/b')['path'] == 'a/b/'
  assert layout.kvstore_spec('s3://bucket')['path'] == ''
  monkeypatch.setenv('GSAE_S3_ENDPOINT', 'http://127.0.0.1:1')
  monkeypatch.setenv('AWS_REGION', 'eu-north-1')
  spec = layout.kvstore_spec('s3://bucket/a')
  assert spec['endpoint'] == 'http://127.0.0.1:1'
  assert spec['aws_region'] == 'eu-north-1'
  ts.KvStore.Spec(spec)
  spec = layout.kvstore_spec('/a/b', 'c')
  assert spec == {'driver': 'file', 'path': '/a/b/c/'}


def test_differences_names_the_leaves():
  have = {'a': {'b': 1, 'c': [2]}, 'd': 3}
  want = {'a': {'b': 1, 'c': [4]}, 'e': 5}
  assert store_lib.differences(have, want) == [
    'a.c is [2] there and [4] here',
    'd is 3 there and None here',
    'e is None there and 5 here',
  ]


def test_sites_are_checked_with_a_hint(whole):
  store = open_store(str(whole))
  store_lib.check_site(store, SITES[0], 'a')
  with pytest.raises(UserError, match="did you mean 'mlp_out.0'"):
    store_lib.check_site(store, 'mlp_out.1', 'a')
