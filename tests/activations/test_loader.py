"""Batch order: every row once an epoch, the same on any mesh, from any step."""

import itertools

import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.activations.loader import Loader
from gsae_jax.errors import UserError
from gsae_jax.mesh import make_mesh
from tests.training.conftest import write_store

BATCH = 256


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return write_store(tmp_path_factory.mktemp('store'), rows=2050)


def take(store, n, start=0, mesh=(4, 1), seed=0, sites=('resid_post.0',)):
  loader = Loader(store, sites, batch_size=BATCH, seed=seed)
  sharding = NamedSharding(make_mesh(*mesh), P('data'))
  batches = loader.batches(sharding, start=start)
  return list(itertools.islice(batches, n))


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order(store):
  batches = [np.asarray(b['resid_post.0']) for b in take(store, 16)]
  rows = store.array('resid_post.0/activations')[:2048].read().result()
  whole = lambda x: np.sort(x[:, 0])
  for epoch in (batches[:8], batches[8:]):
    np.testing.assert_array_equal(whole(np.concatenate(epoch)), whole(rows))
  assert np.any(batches[0] != batches[8])
  assert np.any(batches[0] != rows[:BATCH])


def test_the_order_is_a_function_of_seed_and_step(store):
  whole = take(store, 12)
  for start in (0, 5, 9):
    for got, want in zip(take(store, 3, start), whole[start:], strict=False):
      np.testing.assert_array_equal(got['resid_post.0'], want['resid_post.0'])
  other = take(store, 1, seed=1)[0]['resid_post.0']
  assert np.any(np.asarray(other) != np.asarray(whole[0]['resid_post.0']))


@pytest.mark.parametrize('mesh', [(2, 2), (1, 4)])
def test_every_mesh_gets_the_same_global_batches(store, mesh):
  for got, want in zip(take(store, 3, mesh=mesh), take(store, 3), strict=True):
    np.testing.assert_array_equal(got['resid_post.0'], want['resid_post.0'])
  x = got['resid_post.0']
  assert x.sharding.shard_shape(x.shape) == (BATCH // mesh[0], 16)


def test_sites_share_their_rows(store):
  (batch,) = take(store, 1, sites=('resid_post.0', 'mlp_out.0'))
  np.testing.assert_allclose(batch['mlp_out.0'], 2 * batch['resid_post.0'])


def test_host_rows_are_those_of_the_batch(store):
  loader = Loader(store, ('resid_post.0',), batch_size=BATCH, seed=0)
  want = take(store, 1, start=11)[0]['resid_post.0']
  np.testing.assert_array_equal(loader.rows_at(11, 'resid_post.0'), want)


def test_sizes_that_do_not_fit(store):
  with pytest.raises(UserError, match='larger than the store at .* holds 2050'):
    Loader(store, ('resid_post.0',), batch_size=4096, seed=0)
  with pytest.raises(UserError, match='100 is not a multiple .* 16'):
    Loader(store, ('resid_post.0',), batch_size=100, seed=0)


class HalfOfTheRows:
  """The sharding as one of two processes sees it."""

  def __init__(self, rows):
    self.rows = rows

  def addressable_devices_indices_map(self, shape):
    del shape
    return {0: (self.rows,), 1: (self.rows,)}


def test_a_process_reads_only_the_blocks_of_its_devices(store):
  loader = Loader(store, ('resid_post.0',), batch_size=BATCH, seed=0)
  blocks = loader._local_blocks(HalfOfTheRows(slice(128, 256)))
  assert blocks == list(range(8, 16))
  with pytest.raises(UserError, match='cut a chunk of 16 rows'):
    loader._local_blocks(HalfOfTheRows(slice(0, 40)))


def test_a_damaged_shard_is_named(tmp_path):
  store = write_store(tmp_path)
  path = tmp_path / 'resid_post.0' / 'activations' / 'c' / '1' / '0'
  raw = bytearray(path.read_bytes())
  raw[40::600] = bytes(255 - b for b in raw[40::600])
  path.write_bytes(raw)
  loader = Loader(store, ('resid_post.0',), batch_size=4096, seed=0)
  with pytest.raises(
    UserError, match='--store: DATA_LOSS.*c/1/0.*harvest again'
  ):
    loader.rows_at(0, 'resid_post.0')
