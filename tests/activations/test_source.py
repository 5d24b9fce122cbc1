"""Rows of a store against the language model that made them."""

import dataclasses

import jax
import numpy as np
import pytest

from gsae_jax.activations import forward as forward_lib
from gsae_jax.activations.forward import Forward, fitting, make_forward
from gsae_jax.activations.layout import Encoding
from gsae_jax.errors import Preempted
from tests.support.contexts import held_out_contexts, layout_of
from tests.support.forward import QUICK
from tests.support.sources import (
  SITES,
  activations_of,
  buffer,
  forward,
  same,
  source,
)


@pytest.fixture(scope='module')
def contexts(embedded):
  return held_out_contexts(embedded, documents=40, rows=5000)


def test_every_row_is_its_tokens_activation(embedded, contexts):
  make = source(embedded, contexts)
  assert make.buffers == 3 and make.widths == dict.fromkeys(SITES, 128)
  shards = [buffer(make, s) for s in range(3)]
  assert [len(s['token_ids']) for s in shards] == [2048, 2048, 904]
  stored = {k: np.concatenate([s[k] for s in shards]) for k in shards[0]}
  taken = activations_of(embedded, contexts)
  # Context and position name a token of the text.
  where = stored['context_ids'], stored['positions']
  for site in SITES:
    want = np.asarray(taken[site])[where]
    np.testing.assert_allclose(stored[site], want, atol=1e-4)
  for name, array_CL in (
    ('token_ids', contexts.ids_CL),
    ('special', contexts.special_CL),
    ('document_ids', contexts.documents_CL),
  ):
    np.testing.assert_array_equal(stored[name], array_CL[where])
  # Every usable token once, and of the rest none.
  assert contexts.mask_CL[where].all()
  places = stored['context_ids'] * 32 + stored['positions']
  assert len(np.unique(places)) == 5000


def test_the_digest_is_of_every_token_and_their_order(embedded, contexts):
  digest = source(embedded, contexts).digest()
  assert digest == source(embedded, contexts, buffer_rows=4096).digest()
  assert digest != source(embedded, contexts, seed=1).digest()
  ids_CL, documents_R = contexts.ids_CL.copy(), contexts.documents_R.copy()
  ids_CL[-1, -1] += 1
  documents_R[-1] += 1
  for change in (
    {'ids_CL': ids_CL},
    {'documents_R': documents_R},
    {'special_ids': (0, int(ids_CL[0, 5]))},
    {'special_tokens': 'keep'},
  ):
    other = dataclasses.replace(contexts, **change)
    assert digest != source(embedded, other).digest()


def test_rows_are_mixed_across_contexts(embedded, contexts):
  rows = buffer(source(embedded, contexts), 0)
  # In reading order, the position would rise by one nearly everywhere.
  assert np.mean(np.diff(rows['positions']) == 1) < 0.1
  assert len(np.unique(rows['context_ids'][:32])) > 20


@pytest.mark.integration
def test_buffers_depend_on_seed_and_epoch_and_not_on_devices(
  embedded, contexts
):
  one = buffer(source(embedded, contexts), 1)
  assert same(one, buffer(source(embedded, contexts), 1))
  # To the bit, because each device does the same work.
  for devices in (1, 2):
    layout = layout_of(embedded, devices=devices)
    few = source(embedded, contexts, run=forward(embedded, layout=layout))
    assert same(one, buffer(few, 1))
  run = forward(embedded, batch_contexts=8)
  other = buffer(source(embedded, contexts, run=run), 1)
  np.testing.assert_array_equal(one['token_ids'], other['token_ids'])
  np.testing.assert_allclose(one['mlp_out.0'], other['mlp_out.0'], atol=1e-5)
  seed = buffer(source(embedded, contexts, seed=1), 1)
  epoch = buffer(source(embedded, contexts, epoch=1), 1)
  for other in (seed, epoch):  # Other contexts, in another order.
    shared = np.intersect1d(one['context_ids'], other['context_ids'])
    assert len(shared) < 0.7 * len(np.unique(one['context_ids']))
  again = source(embedded, contexts)
  again.set_epoch(1)
  assert same(buffer(again, 1), epoch)


def test_it_asks_between_passes_whether_to_leave(embedded, contexts):
  calls = []

  def tick():
    calls.append(0)
    if len(calls) == 3:
      raise Preempted

  with pytest.raises(Preempted):
    buffer(source(embedded, contexts), 0, tick=tick)
  assert len(calls) == 3


def test_bfloat16_without_the_mean_keeps_more_of_what_differs(
  embedded, contexts
):
  exact = buffer(source(embedded, contexts), 0)['mlp_out.0']
  make = source(embedded, contexts, dtype='bfloat16')
  encodings = make.encodings()
  encoding = encodings['mlp_out.0']
  np.testing.assert_allclose(
    encoding.mean_D, np.mean(exact, 0), atol=0.1 * exact.std()
  )
  assert np.log2(encoding.scale) % 1 == 0
  # Of a site that never changes, rounding may make the variance negative.
  for value in np.linspace(0, 1, 9):
    run = forward(embedded)
    run.run = lambda params, ids, encodings, dtype, v=value: {
      site: np.full((*ids.shape, 128), v, np.float32) for site in SITES
    }
    constant = source(embedded, contexts, run=run)
    assert constant.encodings()['mlp_out.0'].scale > 0
  # As if the site had a mean of thirty times what differs.
  far = Encoding(encoding.mean_D + 30 * exact.std(), encoding.scale)
  for e, limit in ((encoding, 3e-3), (far, 0.1)):
    stored = make.buffer(0, dict.fromkeys(SITES, e))['mlp_out.0']
    assert stored.dtype == 'bfloat16'
    error = e.decode(stored) - exact
    size = np.sqrt(np.mean(error**2)) / exact.std()
    assert limit / 5 < size < limit


def test_kept_special_tokens_are_marked(embedded):
  contexts = held_out_contexts(
    embedded, documents=40, rows=2000, special_tokens='keep'
  )
  shard = buffer(source(embedded, contexts, rows=2000), 0)
  is_bos = shard['token_ids'] == embedded.tokenizer.bos_id
  np.testing.assert_array_equal(shard['special'], is_bos)
  assert 50 < is_bos.sum() < 100  # One context in 32 tokens, and documents.


@pytest.mark.integration
def test_the_model_stops_behind_the_last_site(stories):
  from gsae_jax.lm.weights import load_language_model

  lm = load_language_model(str(stories[0]), revision=None, dtype='float32')
  ids = np.ones((8, 64), np.int32)

  def flops(sites):
    lowered = make_forward(lm.module, layout_of(lm), sites).lower(
      lm.params,
      jax.numpy.asarray(ids),
      dict.fromkeys(sites),
      dtype=jax.numpy.float32,
    )
    return lowered.compile(QUICK).cost_analysis()['flops']

  first, last = flops(('resid_post.0',)), flops(('resid_post.4',))
  assert 4.5 < last / first < 5.5
  assert flops(('resid_post.0', 'mlp_out.0')) < 1.05 * first


@pytest.mark.integration
@pytest.mark.parametrize(
  ('kind', 'model'),
  [('tensor', 2), ('tensor', 4), ('fully_sharded', 1), ('fully_sharded', 2)],
)
def test_a_divided_model_gives_the_same_rows(kind, model, embedded, contexts):
  sites = (*SITES, 'mlp_hidden.0', 'resid_post.0')
  whole = buffer(source(embedded, contexts, run=forward(embedded, sites)), 1)
  layout = layout_of(embedded, kind, model=model)
  run = forward(embedded, sites, layout=layout)
  divided = buffer(source(embedded, contexts, run=run), 1)
  for name, want in whole.items():
    if name in sites:
      np.testing.assert_allclose(divided[name], want, atol=1e-5, err_msg=name)
    else:
      np.testing.assert_array_equal(divided[name], want, err_msg=name)


@pytest.mark.integration
def test_activations_of_a_divided_model_are_global_arrays(embedded, contexts):
  sites = ('attn_pre_linear.0', 'resid_post.0')
  layout = layout_of(embedded, 'tensor', model=2)
  params = embedded.load(layout.place)
  ids = jax.device_put(contexts.ids_CL[:8], layout.contexts)
  run = make_forward(embedded.module, layout, sites)
  taken = run(params, ids, dict.fromkeys(sites), dtype='float32')
  for site in sites:
    assert taken[site].shape == (8, 32, 128)
    assert len(taken[site].sharding.device_set) == 4
  # Heads lie where they were computed.
  heads = taken['attn_pre_linear.0'].addressable_shards[0].data.shape
  assert heads == (4, 32, 64)


def test_a_batch_is_chosen_to_fit(embedded, contexts):
  assert forward(embedded, batch_contexts=None).batch == 4 * 8192 // 32
  need = lambda contexts: 1000 + 10 * contexts
  # The most tokens, then half as often as need be; at least one context.
  assert fitting(need, 10**9, 1024) == 64
  assert fitting(need, 1500, 1024) == 32
  assert fitting(need, 1, 1024) == 1 and fitting(need, None, 2**20) == 1


@pytest.mark.integration
def test_what_a_batch_needs_is_asked_of_the_compiler(embedded):
  run = forward(embedded)
  need = lambda contexts: run._needed(contexts, 32, 'float32')
  few, many = need(64), need(2048)
  # Ids, two results of two sites, and some of what lies between.
  least = 32 * (4 + 2 * 2 * 128 * 4)
  assert many - few > (2048 - 64) * least
  assert few > embedded.bytes / 4
  # What is asked for in half the bytes needs less.
  assert run._needed(2048, 32, 'bfloat16') < many


@pytest.mark.parametrize('why', ['RESOURCE_EXHAUSTED: hbm', 'INTERNAL: what'])
def test_a_batch_that_the_compiler_refuses_does_not_fit(embedded, why):
  class Refusing:
    def lower(self, *args, **kwargs):
      return self

    def compile(self):
      raise jax.errors.JaxRuntimeError(why)

  run = forward(embedded)
  run.run = Refusing()
  if why.startswith('INTERNAL'):
    with pytest.raises(jax.errors.JaxRuntimeError):
      run._needed(64, 32, 'float32')
  else:
    assert run._needed(64, 32, 'float32') == np.inf


def test_the_batch_is_chosen_for_the_dearest_of_the_programs(
  embedded, monkeypatch
):
  asked = []
  needed = {'bfloat16': 10, 'float32': 10**9}
  monkeypatch.setattr(
    Forward,
    '_needed',
    lambda self, contexts, length, dtype: (
      asked.append((contexts, dtype)) or needed[dtype] * (contexts > 8)
    ),
  )
  monkeypatch.setattr(forward_lib, '_limit', lambda device: 10**6)
  run = forward(
    embedded, batch_contexts=None, dtypes=('bfloat16', 'float32'), length=1024
  )
  assert run.batch == 4 * 8
  assert [contexts for contexts, _ in asked[::2]] == [64, 32, 16, 8]


@pytest.mark.integration
def test_parameters_are_gathered_and_contexts_are_not(embedded, contexts):
  layout = layout_of(embedded, 'fully_sharded')
  sites = ('mlp_hidden.0', 'resid_post.0')
  ids = jax.ShapeDtypeStruct((8, 32), np.int32, sharding=layout.contexts)
  lowered = make_forward(embedded.module, layout, sites).lower(
    embedded.load(layout.place), ids, dict.fromkeys(sites), dtype='float32'
  )
  text = lowered.compile().as_text()
  assert 'all-gather' in text
  for other in (
    'all-reduce',
    'reduce-scatter',
    'all-to-all',
    'collective-perm',
  ):
    assert other not in text
