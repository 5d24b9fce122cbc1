"""Batch order: every row once an epoch, the same on any mesh, from any step."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.activations import loader as loader_lib
from gsae_jax.activations.loader import Loader
from gsae_jax.activations.placement import local_rows
from gsae_jax.activations.store import open_store
from gsae_jax.errors import UserError
from gsae_jax.mesh import make_mesh
from tests.support import activations as known
from tests.support.training import write_store

BATCH = 256
SITE = 'resid_post.0'


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return write_store(tmp_path_factory.mktemp('store'), rows=2050)


def open_loader(store, sites=(SITE,), **changes):
  values = {
    'batch_size': BATCH, 'seed': 0, 'unit': 'chunk', 'shuffle_rows': 1024
  }  # fmt: skip
  return Loader(store, sites, **values | changes)


def take(store, n, start=0, mesh=(4, 1), **changes):
  sharding = NamedSharding(make_mesh(*mesh), P('data'))
  batches = open_loader(store, **changes).batches(sharding, start=start)
  return list(itertools.islice(batches, n))


ORDERS = [
  {'unit': 'chunk', 'shuffle_rows': 1024},
  {'unit': 'chunk', 'shuffle_rows': 256},
  {'unit': 'chunk', 'shuffle_rows': 2048},
  {'unit': 'shard', 'shuffle_rows': 1024},
  {'unit': 'shard', 'shuffle_rows': 2048},
]


@pytest.mark.parametrize('order', ORDERS)
def test_an_epoch_visits_every_row_once_and_the_next_in_another_order(
  store, order
):
  batches = [np.asarray(b[SITE]) for b in take(store, 16, **order)]
  rows = store.array(f'{SITE}/activations')[:2048].read().result()
  whole = lambda x: np.sort(x[:, 0])
  for epoch in (batches[:8], batches[8:]):
    np.testing.assert_array_equal(whole(np.concatenate(epoch)), whole(rows))
  assert np.any(np.sort(batches[0][:, 0]) != np.sort(batches[8][:, 0]))
  assert np.any(batches[0] != rows[:BATCH])


@pytest.mark.parametrize('order', ORDERS)
def test_the_order_is_a_function_of_seed_and_step(store, order):
  whole = take(store, 12, **order)
  for start in (0, 5, 9):
    for got, want in zip(
      take(store, 3, start, **order), whole[start:], strict=False
    ):
      np.testing.assert_array_equal(got[SITE], want[SITE])
  other = take(store, 1, seed=1, **order)[0][SITE]
  assert np.any(np.asarray(other) != np.asarray(whole[0][SITE]))


def test_every_batch_of_a_round_has_rows_of_every_unit(tmp_path):
  known.fill(tmp_path)
  store = open_store(str(tmp_path))
  x = store.array('mlp_out.0/activations')[:].read().result()
  unit_of = {row.tobytes(): i // known.CHUNK for i, row in enumerate(x)}
  # Rounds of 8 chunks of 32 rows, dealt over 4 batches of 64: 8 rows of each.
  batches = take(
    store, 8, sites=('mlp_out.0',), batch_size=64, shuffle_rows=256
  )
  for i in (0, 4):
    rounds = []
    for batch in batches[i : i + 4]:
      units = [unit_of[np.asarray(r).tobytes()] for r in batch['mlp_out.0']]
      numbers, counts = np.unique(units, return_counts=True)
      assert len(numbers) == 8 and (counts == 8).all()
      rounds.append(set(numbers.tolist()))
    assert all(r == rounds[0] for r in rounds)


@pytest.mark.parametrize('mesh', [(2, 2), (1, 4)])
@pytest.mark.parametrize('order', ORDERS[::3])
def test_every_mesh_gets_the_same_global_batches(store, mesh, order):
  for got, want in zip(
    take(store, 3, mesh=mesh, **order), take(store, 3, **order), strict=True
  ):
    np.testing.assert_array_equal(got[SITE], want[SITE])
  x = got[SITE]
  assert x.sharding.shard_shape(x.shape) == (BATCH // mesh[0], 16)


def test_two_rounds_are_in_memory_and_the_next_is_read_meanwhile(
  store, monkeypatch
):
  arrived, pools = [], []

  class Watched(loader_lib.Pool):
    def __init__(self, *args):
      super().__init__(*args)
      pools.append(self)
      self.memory = self._rows[SITE].ctypes.data

  monkeypatch.setattr(loader_lib, 'Pool', Watched)
  monkeypatch.setattr('gsae_jax.activations.reading._UNDER_WAY', 0)
  sharding = NamedSharding(make_mesh(4, 1), P('data'))
  # Rounds of four batches, from 64 chunks.
  batches = open_loader(store).batches(sharding, start=0)
  for i in range(20):
    next(batches)
    arrived.append(pools[-1]._arrived)
    assert len(pools) == 2 + i // 4
  assert arrived[:4] == [0, 16, 32, 48] == arrived[8:12]
  assert len({p.memory for p in pools}) == 2


@pytest.mark.parametrize('order', ORDERS[::3])
def test_memory_gives_the_batches_of_the_store(store, order):
  for got, want in zip(
    take(store, 10, start=3, in_memory=True, **order),
    take(store, 10, start=3, **order),
    strict=True,
  ):
    np.testing.assert_array_equal(got[SITE], want[SITE])


def test_a_store_in_memory_is_not_read_again(tmp_path):
  store = write_store(tmp_path, rows=2050)
  want = take(store, 10)
  loader = open_loader(store, in_memory=True)
  shutil.rmtree(tmp_path)
  sharding = NamedSharding(make_mesh(4, 1), P('data'))
  for got, expected in zip(
    loader.batches(sharding, start=0), want, strict=False
  ):
    np.testing.assert_array_equal(got[SITE], expected[SITE])


def test_sites_share_their_rows(store):
  (batch,) = take(store, 1, sites=(SITE, 'mlp_out.0'))
  np.testing.assert_allclose(batch['mlp_out.0'], 2 * batch[SITE])


@pytest.mark.parametrize('in_memory', [False, True])
def test_host_rows_are_those_of_the_batch(store, in_memory):
  loader = open_loader(store, in_memory=in_memory)
  for step in (11, 12, 3):
    want = take(store, 1, start=step)[0][SITE]
    np.testing.assert_array_equal(loader.rows_at(step, SITE), want)
    rows = store.array(f'{SITE}/activations')[loader.row_numbers(step)]
    np.testing.assert_array_equal(rows.read().result(), want)


def test_a_removed_mean_is_put_back_on_the_device(tmp_path):
  known.fill(tmp_path, centred=True)
  store = open_store(str(tmp_path))
  sizes = {'batch_size': 64, 'shuffle_rows': 256}
  (batch,) = take(store, 1, sites=('mlp_out.0',), **sizes)
  x = batch['mlp_out.0']
  assert x.dtype == np.float32 and x.sharding.shard_shape(x.shape) == (16, 8)
  # The rows are normal, halved, around a line from -40 to 40.
  line = np.linspace(-40, 40, 8)
  assert np.abs(np.asarray(x) - line).max() < 3
  host = open_loader(store, ('mlp_out.0',), **sizes).rows_at(0, 'mlp_out.0')
  np.testing.assert_allclose(host, x, rtol=1e-6)


def test_sizes_that_do_not_fit(store):
  for changes, match in (
    ({'shuffle_rows': 4096}, 'larger than the store at .* holds 128 whole chu'),
    ({'unit': 'shard', 'shuffle_rows': 3072}, 'holds 2 whole shards of 1024'),
    ({'batch_size': 100, 'shuffle_rows': 200}, 'chunk_rows of the store, 16'),
    ({'batch_size': 100}, '1024 is not a multiple of train.batch_size, 100'),
    ({'batch_size': 32}, '32 batches of 32, over which 16 rows of a chunk'),
  ):
    with pytest.raises(UserError, match=match):
      open_loader(store, **changes)


class PartOfTheRows:
  """The sharding as one of two processes sees it."""

  def __init__(self, rows):
    self.rows = rows

  def addressable_devices_indices_map(self, shape):
    del shape
    return {0: (self.rows,), 1: (self.rows,)}


def test_a_process_reads_only_the_units_of_its_rows(store, monkeypatch):
  loader = open_loader(store)
  want = take(store, 8)
  read = []
  pool = loader_lib.Pool
  monkeypatch.setattr(
    loader_lib, 'Pool', lambda r, u, s: read.append(u) or pool(r, u, s)
  )
  # A device's rows may begin in the middle of what a unit gives to a batch.
  for part, units in ((slice(128, 256), range(32, 64)), (slice(0, 6), [0, 1])):
    rows = local_rows(PartOfTheRows(part), BATCH)
    np.testing.assert_array_equal(rows, np.arange(BATCH)[part])
    for i, got in enumerate(loader_rounds(loader, rows)):
      np.testing.assert_array_equal(got, np.asarray(want[i][SITE])[part])
    assert [len(u) for u in read[-2:]] == [len(units)] * 2
    np.testing.assert_array_equal(read[-2], loader.units_at(0)[list(units)])


def loader_rounds(loader, rows):
  rounds = [loader_lib._Round(loader, i, (SITE,), rows) for i in range(2)]
  return [r.batch(i)[SITE] for r in rounds for i in range(4)]


FOREIGN = 'its rows are not those that were written'


@pytest.mark.parametrize('unit', ['chunk', 'shard'])
def test_a_damaged_shard_is_named(tmp_path, unit):
  store = write_store(tmp_path)
  path = tmp_path / SITE / 'activations' / 'c' / '1' / '0'
  good = path.read_bytes()
  flipped = bytearray(good)
  flipped[40::600] = bytes(255 - b for b in flipped[40::600])
  other = path.parent.parent / '2' / '0'
  for bad, match in (
    (flipped, r'resid_post.0/activations/c/1/0: .*DATA_LOSS.*verify .* --rep'),
    (good[:-4], 'c/1/0: .*DATA_LOSS'),
    (other.read_bytes(), f'c/1/0: {FOREIGN}'),
    (None, 'c/1/0: .*missing'),
  ):
    path.unlink()
    if bad:
      path.write_bytes(bad)
    loader = open_loader(store, unit=unit, batch_size=4096, shuffle_rows=4096)
    with pytest.raises(UserError, match=match):
      loader.rows_at(0, SITE)
    path.write_bytes(good)


def test_a_damaged_record_is_named(tmp_path):
  store = write_store(tmp_path)
  path = tmp_path / 'records' / '1.json'
  good = path.read_text()
  for bad, match in (
    (good[:-9], 'records/1.json: the record is damaged'),
    (good.replace('"shard": 1', '"shard": 3'), 'records/1.json: the record'),
    ((tmp_path / 'records/3.json').read_text(), '1.json: it is shard 3 of'),
  ):
    path.write_text(bad)
    loader = open_loader(store, batch_size=4096, shuffle_rows=4096)
    with pytest.raises(UserError, match=match):
      loader.rows_at(0, SITE)
  assert json.loads(good)['store'] == store.content_hash


def test_transfers_are_explicit(store):
  sharding = NamedSharding(make_mesh(2, 2), P('data'))
  batches = open_loader(store).batches(sharding, start=0)
  with jax.transfer_guard('disallow'):
    next(batches)
