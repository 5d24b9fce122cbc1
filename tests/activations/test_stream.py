"""Training batches straight from the language model."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.activations.layout import content_hash
from gsae_jax.activations.source import nothing
from gsae_jax.activations.stream import Stream
from gsae_jax.errors import Preempted, UserError
from gsae_jax.mesh import make_mesh
from tests.support.contexts import held_out_contexts
from tests.support.sources import SITES, buffer, source

SITE = 'mlp_out.0'


@pytest.fixture(scope='module')
def contexts(embedded):
  return held_out_contexts(embedded, documents=20, rows=2100)


def stream(
  lm, contexts, *, batch_size=128, centre=False, tick=nothing, **changes
):
  values = {'rows': 2100, 'buffer_rows': 512}
  return Stream(
    source(lm, contexts, **values | changes),
    identity={'seed': 0},
    provenance={},
    batch_size=batch_size,
    centre=centre,
    dtype=changes.get('dtype', 'float32'),
    tick=tick,
  )


def take(s, n, start=0, mesh=(4, 1)):
  sharding = NamedSharding(make_mesh(*mesh), P('data'))
  return list(itertools.islice(s.batches(sharding, start=start), n))


def test_batches_are_the_buffers_one_after_the_other(embedded, contexts):
  make = source(embedded, contexts, rows=2100, buffer_rows=512)
  got = take(stream(embedded, contexts), 20)
  # Four buffers an epoch; 52 rows are left over.
  for site in SITES:
    want = [buffer(make, i)[site] for i in range(4)]
    make.set_epoch(1)
    want.append(buffer(make, 0)[site])
    make.set_epoch(0)
    np.testing.assert_array_equal(
      np.concatenate([b[site] for b in got]), np.concatenate(want)
    )


def test_any_step_can_be_the_first(embedded, contexts):
  whole = take(stream(embedded, contexts), 20)
  s = stream(embedded, contexts)
  for start in (0, 5, 17, 2):  # Forth and back, over the epoch.
    for got, want in zip(
      take(s, 2, start, (2, 2)), whole[start:], strict=False
    ):
      np.testing.assert_array_equal(got[SITE], want[SITE])
    np.testing.assert_array_equal(s.rows_at(start, SITE), whole[start][SITE])


def test_a_centred_stream_gives_activations(embedded, contexts):
  want = take(stream(embedded, contexts), 1)[0][SITE]
  s = stream(embedded, contexts, dtype='bfloat16', centre=True)
  got = take(s, 1)[0][SITE]
  assert got.dtype == np.float32
  assert np.abs(got - want).max() < 0.03 * np.abs(want).max()
  assert np.any(np.asarray(got) != np.asarray(want))
  np.testing.assert_allclose(s.rows_at(0, SITE), got, rtol=1e-6)


def test_statistics_are_of_the_first_buffer(embedded, contexts):
  s = stream(embedded, contexts)
  x = buffer(source(embedded, contexts, rows=2100, buffer_rows=512), 0)[SITE]
  site = s.store.sites[SITE]
  np.testing.assert_allclose(site.mean_D, x.mean(0, np.float64), rtol=1e-9)
  norm_N = np.linalg.norm(x.astype(np.float64), axis=1)
  np.testing.assert_allclose(site.mean_norm, norm_N.mean(), rtol=1e-9)
  want = (norm_N**2).mean()
  np.testing.assert_allclose(site.mean_squared_norm, want, rtol=1e-9)
  assert s.store.content_hash == content_hash(
    {'identity': {'seed': 0, 'streamed': True}, 'encodings': None}
  )
  assert site.width == 128 and s.store.rows == 2100


def test_sizes_that_do_not_fit(embedded, contexts):
  with pytest.raises(UserError, match='512 is not a multiple of train.batch_s'):
    stream(embedded, contexts, batch_size=100)
  with pytest.raises(UserError, match='4096 is more than the 2100 rows of the'):
    stream(embedded, contexts, buffer_rows=4096)


def test_filling_a_buffer_can_be_left(embedded, contexts):
  calls = []

  def tick():
    calls.append(0)
    if len(calls) == 2:
      raise Preempted

  s = stream(embedded, contexts, tick=tick)  # The first is filled in peace.
  batches = s.batches(NamedSharding(make_mesh(4, 1), P('data')), start=0)
  for _ in range(4):
    next(batches)
  with pytest.raises(Preempted):
    next(batches)
  s.rows_at(4, SITE)  # Which resampling asks for; it does not ask back.
  assert len(calls) == 2


def test_transfers_are_explicit(embedded, contexts):
  batches = stream(embedded, contexts).batches(
    NamedSharding(make_mesh(2, 2), P('data')), start=3
  )
  with jax.transfer_guard('disallow'):
    next(batches), next(batches)
