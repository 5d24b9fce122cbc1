"""The integrity check: no byte changes unnoticed, and repair deletes only what is bad."""

import json
import shutil
import types

import numpy as np
import pytest
import tensorstore as ts

from gsae_jax.activations import shards
from gsae_jax.activations.verify import Verifier
from gsae_jax.errors import UserError
from tests.support.activations import DAMAGES, SHARDS, fill, put, writer
from tests.support.commands import files


def verify(path):
  return [d for bad in Verifier(str(path)).damage() for d in bad]


def test_a_sound_store_has_no_damage(whole):
  assert verify(whole) == []


def test_every_changed_byte_is_reported_with_its_file(tmp_path, whole):
  shutil.copytree(whole, tmp_path / 'store')
  store = tmp_path / 'store'
  names = [
    name
    for name in files(store)
    if not name.endswith('zarr.json') and name != 'manifest.json'
  ]
  sizes = np.array([(store / name).stat().st_size for name in names])
  rng = np.random.default_rng(0)
  # Bytes of all files alike, so that long ones are hit most, and then each
  # file once, so that none is left out.
  flat = rng.choice(sizes.sum(), 200 - len(names), replace=False)
  which = np.searchsorted(np.cumsum(sizes), flat, side='right')
  hits = [
    (names[i], int(f - np.cumsum(sizes)[i] + sizes[i]))
    for i, f in zip(which, flat, strict=True)
  ]
  hits += [(n, int(rng.integers(s))) for n, s in zip(names, sizes, strict=True)]
  assert len(hits) == 200
  for name, at in hits:
    path = store / name
    good = path.read_bytes()
    bad = bytearray(good)
    bad[at] ^= int(rng.integers(1, 256))
    path.write_bytes(bad)
    assert [d.key for d in verify(store)] == [name], (name, at)
    path.write_bytes(good)
  assert verify(store) == []


@pytest.mark.parametrize('damage', DAMAGES, ids=lambda f: f.__name__)
def test_repair_deletes_what_is_bad_and_harvest_writes_it(
  damage, tmp_path, whole
):
  path = tmp_path
  fill(path)
  fill(path / 'foreign', identity={'seed': 1}, salt=1)
  damage(path, whole)
  shutil.rmtree(path / 'foreign')
  bad = verify(path)
  assert bad and {d.shard for d in bad} == {2}
  before = files(path)
  Verifier(str(path)).repair(bad)
  gone = before.keys() - files(path).keys()
  expected = {d.key for d in bad} | {'records/2.json'}
  assert gone == expected & before.keys()
  assert fill(path) == [2]
  assert files(path) == files(whole) and verify(path) == []


def test_a_flipped_bit_in_the_middle_is_repaired_too(tmp_path, whole):
  # The writer looks at first chunks only; this is what `verify` is for.
  fill(tmp_path)
  file = tmp_path / 'resid_post.1/activations/c/1/0'
  raw = bytearray(file.read_bytes())
  raw[2000] ^= 1
  file.write_bytes(raw)
  (bad,) = verify(tmp_path)
  assert bad.shard == 1 and 'Digest mismatch' in bad.why
  Verifier(str(tmp_path)).repair([bad])
  assert fill(tmp_path) == [1]
  assert files(tmp_path) == files(whole)


def test_a_lost_record_is_damage_of_a_finished_store_only(tmp_path):
  fill(tmp_path)
  (tmp_path / 'records/3.json').unlink()
  (bad,) = verify(tmp_path)
  assert (bad.shard, bad.key, bad.why) == (3, 'records/3.json', 'is missing')
  with writer(tmp_path):  # Which knows that it is not finished.
    assert verify(tmp_path) == []


def test_a_centred_store_is_another_store_with_another_mean(tmp_path):
  fill(tmp_path / 'a', centred=True)
  fill(tmp_path / 'b')
  name = 'mlp_out.0/activations/c/1/0'
  a, b = files(tmp_path / 'a'), files(tmp_path / 'b')
  assert a[name] == b[name]  # Sound, and of the same identity.
  shutil.copy(tmp_path / 'b/records/1.json', tmp_path / 'a/records/1.json')
  (bad,) = verify(tmp_path / 'a')
  assert bad.shard == 1 and 'of the store' in bad.why


def test_repair_on_storage_that_forbids_it_has_a_line(tmp_path):
  fill(tmp_path)
  bad = verify(tmp_path)
  assert not bad
  (tmp_path / 'token_ids/c/1').unlink()
  (tmp_path / 'token_ids/c/1/in_the_way').mkdir(parents=True)
  bad = verify(tmp_path)
  with pytest.raises(UserError, match='cannot delete .*token_ids/c/1'):
    Verifier(str(tmp_path)).repair(bad)


def test_lost_metadata_of_an_array_is_found(tmp_path, whole):
  fill(tmp_path)
  (tmp_path / 'positions/zarr.json').unlink()
  (bad,) = verify(tmp_path)
  assert bad.shard is None and bad.key == 'positions/zarr.json'
  Verifier(str(tmp_path)).repair([bad])
  fill(tmp_path)
  assert files(tmp_path) == files(whole)


def test_an_unfinished_store_is_not_a_damaged_one(tmp_path):
  with writer(tmp_path) as w:
    put(w, 1), w.flush()
  verifier = Verifier(str(tmp_path))
  assert [d for bad in verifier.damage() for d in bad] == []
  assert verifier.there == [1] and verifier.shards == SHARDS
  with pytest.raises(UserError, match='no activation store'):
    Verifier(str(tmp_path / 'nowhere'))


def test_fingerprints_are_weighted_sums_of_words():
  x = np.random.default_rng(0).integers(0, 2**16, (7, 6)).astype(np.uint16)

  def row(values):  # Twelve bytes: two words, half of the second padding.
    raw = values.tobytes() + bytes(4)
    return sum(int.from_bytes(raw[i : i + 8], 'little') for i in (0, 8))

  want = [
    sum((2 * i + 1) * row(r) for i, r in enumerate(x[k : k + 3])) % 2**64
    for k in (0, 3, 6)
  ]
  got = shards.fingerprints(x, 3)
  np.testing.assert_array_equal(got, np.array(want, np.uint64))
  # Rows in another order are other rows; of scalars, too.
  assert shards.fingerprints(x[[1, 0, 2]], 3)[0] != got[0]
  assert shards.fingerprints(np.array([3, 5]), 2) == [3 + 3 * 5]
  assert shards.fingerprints(np.array([True, True, False]), 3) == [1 + 3]


def test_records_come_back_and_notice_changes(whole):
  raw = (whole / 'records' / '0.json').read_bytes()
  manifest = json.loads((whole / 'manifest.json').read_text())
  store = manifest['content_hash']
  record = shards.read_record(raw, store, 0)
  assert record.to_json(store, 0) == raw
  with pytest.raises(shards.Foreign, match='shard 0 of the store'):
    shards.read_record(raw, store, 1)
  with pytest.raises(shards.Foreign):
    shards.read_record(raw, 'f' * 64, 0)
  for bad in (
    raw[:-1], raw.replace(b'"shard": 0', b'"shard": 1'), b'[]', b'',
    b'[' * 100_000, (whole / 'manifest.json').read_bytes(),
  ):  # fmt: skip
    with pytest.raises(shards.Damaged, match='damaged'):
      shards.read_record(bad, store, 1)


def test_storage_that_does_not_answer_is_no_damage(whole, monkeypatch):
  # Else `--repair` would delete what is sound.
  def fail(self, *unused, **also_unused):
    promise, future = ts.Promise.new()
    promise.set_exception(ValueError('UNAVAILABLE: try later [source=x]'))
    return future

  verifier = Verifier(str(whole))
  monkeypatch.setattr(verifier, '_kv', types.SimpleNamespace(read=fail))
  with pytest.raises(UserError, match='cannot read .*0.json: UNAVAILABLE: try'):
    list(verifier.damage())
  monkeypatch.undo()
  closed = ts.Promise.new()
  closed[0].set_exception(ValueError('PERMISSION_DENIED: no [source=x]'))
  monkeypatch.setattr(ts, 'open', lambda *unused, **also_unused: closed[1])
  with pytest.raises(UserError, match='PERMISSION_DENIED: no'):
    list(Verifier(str(whole)).damage())
