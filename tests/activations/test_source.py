"""Rows of a store against the language model that made them."""

import jax
import numpy as np
import pytest

from gsae_jax.activations.source import ShardSource
from gsae_jax.lm import text
from gsae_jax.mesh import make_mesh

SITES = ('mlp_out.0', 'attn_pre_linear.0')


@pytest.fixture(scope='module')
def contexts(embedded):
  documents = text.read_documents('stdlib', None)
  return text.pack(
    text.split(documents, 0.1, 'held_out')[:40],
    embedded.tokenizer,
    context_length=32,
    packing='stream',
    prepend_bos=True,
    special_tokens='drop',
    rows=5000,
  )


def source(lm, contexts, **changes):
  values = {
    'sites': SITES,
    'rows': 5000,
    'shard_rows': 2048,
    'batch_contexts': 16,
    'dtype': 'float32',
    'seed': 0,
    'mesh': make_mesh(-1, 1),
  }
  return ShardSource(lm, contexts, **values | changes)


def test_every_row_is_its_tokens_activation(embedded, contexts):
  make = source(embedded, contexts)
  shards = [make(s) for s in range(3)]
  assert [len(s['token_ids']) for s in shards] == [2048, 2048, 904]
  stored = {k: np.concatenate([s[k] for s in shards]) for k in shards[0]}
  _, taken = embedded.module.apply(
    {'params': embedded.params}, contexts.ids_CL, sites=SITES, logits=False
  )
  # Each stored row is looked up in the model's own output, by its value.
  mask = contexts.mask_CL
  want = {site: np.asarray(taken[site])[mask] for site in SITES}
  a, b = stored['mlp_out.0'], want['mlp_out.0']
  distance = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
  nearest = distance.argmin(1)
  for site in SITES:
    np.testing.assert_allclose(stored[site], want[site][nearest], atol=1e-4)
  positions = np.broadcast_to(np.arange(32), mask.shape)[mask]
  np.testing.assert_array_equal(
    stored['token_ids'], contexts.ids_CL[mask][nearest]
  )
  np.testing.assert_array_equal(stored['positions'], positions[nearest])
  assert not stored['special'].any()
  # Rows that repeat (the first words of a file) share a nearest one.
  assert len(set(nearest.tolist())) > 0.97 * 5000


def test_rows_are_mixed_across_contexts(embedded, contexts):
  shard = source(embedded, contexts)(0)
  # In reading order, the position would rise by one nearly everywhere.
  assert np.mean(np.diff(shard['positions']) == 1) < 0.1


def test_shards_depend_on_the_seed_and_on_nothing_else(embedded, contexts):
  one = source(embedded, contexts)(1)
  again = source(embedded, contexts, batch_contexts=32)(1)
  other = source(embedded, contexts, seed=1)(1)
  np.testing.assert_array_equal(one['token_ids'], again['token_ids'])
  np.testing.assert_allclose(one['mlp_out.0'], again['mlp_out.0'], atol=1e-5)
  assert np.any(one['token_ids'] != other['token_ids'])


def test_kept_special_tokens_are_marked(embedded):
  documents = text.read_documents('stdlib', None)
  contexts = text.pack(
    text.split(documents, 0.1, 'held_out')[:40],
    embedded.tokenizer,
    context_length=32,
    packing='stream',
    prepend_bos=True,
    special_tokens='keep',
    rows=2000,
  )
  shard = source(embedded, contexts, rows=2000)(0)
  is_bos = shard['token_ids'] == embedded.tokenizer.bos_id
  np.testing.assert_array_equal(shard['special'], is_bos)
  assert 50 < is_bos.sum() < 100  # One context in 32 tokens, and documents.


def test_the_model_stops_behind_the_last_site(stories):
  from gsae_jax.lm.weights import load_language_model

  lm = load_language_model(str(stories[0]), revision=None, dtype='float32')
  ids = np.ones((8, 64), np.int32)

  def flops(sites):
    contexts = text.Contexts(ids, ids > 0, ids < 0)
    make = source(
      lm, contexts, sites=sites, rows=8, batch_contexts=8, mesh=make_mesh(-1, 1)
    )
    lowered = make.forward.lower(lm.params, jax.numpy.asarray(ids))
    return lowered.compile().cost_analysis()['flops']

  first, last = flops(('resid_post.0',)), flops(('resid_post.4',))
  assert 4.5 < last / first < 5.5
  assert flops(('resid_post.0', 'mlp_out.0')) < 1.05 * first
