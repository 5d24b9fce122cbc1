"""The evaluator against float64 NumPy that materialises everything."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsae_jax.errors import UserError
from gsae_jax.evaluation import devices as devices_lib
from gsae_jax.evaluation import metrics, passes
from gsae_jax.evaluation.splice import Evaluator
from gsae_jax.sae import ARCHITECTURES, tiles
from tests.support.contexts import layout_of
from tests.support.forward import QUICK
from tests.support.untrained import FEATURES, LENGTH, SITE, TOKENS, WIDTH

# Several programs over devices, for every division of them.
pytestmark = pytest.mark.integration


def slow(changes):
  """A division whose parts other rows have."""
  return pytest.param(changes, marks=pytest.mark.slow)


def evaluate(
  embedded,
  contexts,
  saes,
  layout=('replicated', 1),
  devices=None,
  **changes,
):
  kind, model = layout
  values = {
    'tokens': TOKENS,
    'batch_size': 8,
    'parallel': 'pmap',
    'layout': layout_of(embedded, kind, model=model, devices=devices),
  }
  evaluator = Evaluator(embedded, contexts, **values | changes)
  return {
    k: metrics.record(first.sums, first.fired_F)
    for k, (first, *_) in evaluator.run(saes).items()
  }


def softmax_losses(logits, ids):
  logits = logits - logits.max(-1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  picked = np.take_along_axis(log_p[:, :-1], ids[:, 1:, None], -1)[..., 0]
  return -picked, log_p


def counted_mask(contexts):
  """TOKENS positions count, in order; the rest are as if masked."""
  rank_CL = np.cumsum(contexts.mask_CL).reshape(contexts.ids_CL.shape)
  return contexts.mask_CL & (rank_CL <= TOKENS)


def encoded(sae, p, x):
  """Features and reconstructions by definition, in float64."""
  W_enc = p['W_gate'] if sae == 'gated' else p['W_enc']
  z = (x - p['b_dec']) @ W_enc
  if sae == 'gated':
    magnitude = np.maximum(np.exp(p['r_mag']) * z + p['b_mag'], 0)
    f = (z + p['b_gate'] > 0) * magnitude
  else:
    f = np.maximum(z + p['b_enc'], 0)
  return f, f @ p['W_dec'] + p['b_dec']


@functools.partial(jax.jit, static_argnums=(0, 1))
def _spliced(module, site, params, ids, mask, new):
  """Logits, and the site's activations with rows of the mask replaced."""
  logits, taken = module.apply(
    {'params': params},
    ids,
    sites=(site,),
    edits={site: lambda x: jnp.where(mask[..., None], new, x)},
  )
  return logits, taken[site]


def expected(embedded, contexts, sae, p, site=SITE, mask=None):
  """The record by definition; only the language model itself is float32."""
  ids = contexts.ids_CL
  mask = counted_mask(contexts) if mask is None else mask

  def run(mask, new):
    new = np.broadcast_to(np.float32(new), (*ids.shape, WIDTH))
    out = _spliced(embedded.module, site, embedded.params, ids, mask, new)
    return [np.asarray(v, np.float64) for v in out]

  logits, x = run(np.zeros_like(mask), 0)
  p = {k: v.astype(np.float64) for k, v in p.items()}
  f, x_hat = encoded(sae, p, x)
  losses = lambda new: softmax_losses(run(mask, new)[0], ids)
  counted = mask[:, :-1]
  clean, log_p = softmax_losses(logits, ids)
  spliced, log_q = losses(x_hat)
  zero, log_zero = losses(np.zeros_like(x))
  average, log_average = losses(x[mask].mean(0))
  mean = lambda v: v[counted].mean()
  kl = lambda q: mean((np.exp(log_p) * (log_p - q)).sum(-1)[:, :-1])
  recovered = 1 - (mean(spliced) - mean(clean)) / (mean(zero) - mean(clean))
  x, x_hat, f = x[mask], x_hat[mask], f[mask]
  fired = (f > 0).sum(0)
  error = ((x - x_hat) ** 2).sum(1).mean()
  dot = (x * x_hat).sum(1)
  norms = np.linalg.norm(x, axis=1) * np.linalg.norm(x_hat, axis=1)
  return {
    'l0': (f > 0).sum(1).mean(),
    'loss_recovered': recovered,
    'loss_recovered_mean_ablation': 1
    - (mean(spliced) - mean(clean)) / (mean(average) - mean(clean)),
    'log_loss_unrecovered': np.log(1 - recovered),
    'ce_clean': mean(clean),
    'ce_spliced': mean(spliced),
    'ce_zero_ablation': mean(zero),
    'ce_mean_ablation': mean(average),
    'kl_clean_spliced': kl(log_q),
    'kl_zero_ablation': kl(log_zero),
    'kl_mean_ablation': kl(log_average),
    'gamma': (x_hat**2).sum() / dot.sum(),
    'explained_variance': 1 - error / ((x - x.mean(0)) ** 2).sum(1).mean(),
    'mse': error,
    'cosine': (dot / norms).mean(),
    'alive_fraction': (fired > 0).mean(),
    'dead_features': (fired == 0).sum(),
    'dense_features': (fired > 0.1 * mask.sum()).sum(),
    'num_tokens': mask.sum(),
    'num_documents': len(set(contexts.documents_CL[mask])),
  }


def assert_equal(got, want, **kwargs):
  """Of what `expected` gives, to a relative 1e-5."""
  for name, value in want.items():
    np.testing.assert_allclose(
      got[name], value, err_msg=name, **{'rtol': 1e-5} | kwargs
    )


def flat(record):
  """What can be compared as numbers."""
  record = dict(record)
  intervals = record.pop('intervals')
  assert intervals['loss_recovered'][0] < record['loss_recovered']
  assert intervals['loss_recovered'][1] > record['loss_recovered']
  density = record.pop('density')['features']
  return (
    record | {'density': density} | {f'{k}_': v for k, v in intervals.items()}
  )


@pytest.mark.parametrize('site', ['mlp_out.0', 'attn_pre_linear.0'])
def test_every_metric_equals_its_definition(site, embedded, contexts, saes):
  # A member may be called what a site is.
  names = {'gated': site, 'relu': 'relu'}
  members = {
    names[sae]: (module, site, p) for sae, (module, _, p) in saes.items()
  }
  records = evaluate(embedded, contexts, members)
  for sae, (_, _, p) in saes.items():
    got = records[names[sae]]
    want = expected(embedded, contexts, sae, p, site)
    assert set(got) == set(want) | {'density', 'intervals'}
    assert_equal(got, want)
    assert 0.05 < want['alive_fraction'] <= 1 and want['l0'] > 1
    assert want['num_documents'] > 2
    assert sum(got['density']['features']) == FEATURES - want['dead_features']


@pytest.fixture(scope='module')
def on_four(embedded, contexts, saes):
  """What pmap over the four devices measures."""
  return evaluate(embedded, contexts, saes)


@pytest.mark.parametrize(
  'changes',
  [
    {'parallel': 'mesh'},
    slow({'devices': 1}),
    {'devices': 1, 'parallel': 'mesh', 'batch_size': 3},
    {'devices': 2},
    slow({'devices': 2, 'parallel': 'mesh'}),
    slow({'batch_size': 4}),
    slow({'batch_size': 12, 'parallel': 'mesh'}),
    {'parallel': 'auto'},
    {'parallel': 'mesh', 'layout': ('tensor', 2)},
    slow({'parallel': 'auto', 'layout': ('tensor', 4)}),
    slow({'parallel': 'auto', 'layout': ('fully_sharded', 1)}),
    {'parallel': 'auto', 'layout': ('fully_sharded', 2)},
  ],
)
def test_neither_devices_nor_batches_matter(
  changes, embedded, contexts, saes, on_four
):
  got = evaluate(embedded, contexts, saes, **changes)
  for sae, record in on_four.items():
    assert got[sae].keys() == record.keys()
    assert_equal(flat(got[sae]), flat(record))


@pytest.mark.parametrize('few', [0.0, 2.0])  # Whole products; by tiles.
def test_decoding_by_tiles_measures_the_same(
  few, embedded, contexts, saes, on_four, monkeypatch
):
  asked = []
  decode = tiles.decode
  monkeypatch.setattr(
    tiles, 'decode', lambda *a: asked.append(a[0].shape) or decode(*a)
  )
  monkeypatch.setattr(devices_lib, '_LARGE', FEATURES)
  monkeypatch.setattr(tiles, 'FEW', few)
  found = evaluate(embedded, contexts, saes)
  assert asked == [(2, LENGTH, FEATURES)] * 2
  for name in saes:
    assert_equal(flat(found[name]), flat(on_four[name]))
  # Only programs of one device do.
  evaluate(embedded, contexts, saes, parallel='mesh')
  assert len(asked) == 2


@pytest.mark.parametrize('policy', ['drop', 'keep'])
def test_special_tokens_are_counted_both_ways(policy, embedded, contexts, saes):
  own = dataclasses.replace(contexts, special_tokens=policy)
  last = np.flatnonzero(counted_mask(own))[-1]
  flat_mask = np.arange(own.ids_CL.size).reshape(own.ids_CL.shape) <= last
  other = {'drop': np.ones_like, 'keep': lambda _: ~own.special_CL}[policy]
  masks = counted_mask(own), flat_mask & other(flat_mask)
  assert masks[0].sum() == TOKENS != masks[1].sum()
  evaluator = Evaluator(
    embedded,
    own,
    tokens=TOKENS,
    batch_size=8,
    parallel='auto',
    layout=layout_of(embedded),
    both=True,
  )
  for sae, found in evaluator.run(saes).items():
    for measured, mask in zip(found, masks, strict=True):
      got = metrics.record(measured.sums, measured.fired_F)
      assert_equal(
        got, expected(embedded, own, sae, saes[sae][2], mask=mask), rtol=2e-5
      )


def test_a_perfect_and_an_empty_reconstruction(embedded, contexts, saes):
  module, site, p = saes['relu']
  empty = {k: np.zeros_like(v) for k, v in p.items()}
  # x = relu(x) - relu(-x), exactly.
  perfect = {k: np.zeros_like(v) for k, v in p.items()}
  perfect['W_enc'] = np.zeros((WIDTH, FEATURES * 2), np.float32)
  perfect['W_enc'][:, :WIDTH] = np.eye(WIDTH)
  perfect['W_enc'][:, WIDTH : 2 * WIDTH] = -np.eye(WIDTH)
  perfect['W_dec'] = perfect['W_enc'].T.copy()
  perfect['b_enc'] = np.zeros(FEATURES * 2, np.float32)
  wide = ARCHITECTURES['relu'](WIDTH, FEATURES * 2)
  records = evaluate(
    embedded,
    contexts,
    {'empty': (module, site, empty), 'perfect': (wide, site, perfect)},
  )
  assert records['empty']['loss_recovered'] == 0
  assert records['empty']['l0'] == 0 and records['empty']['gamma'] is None
  assert records['empty']['alive_fraction'] == 0
  np.testing.assert_allclose(records['perfect']['loss_recovered'], 1, atol=1e-5)
  np.testing.assert_allclose(records['perfect']['gamma'], 1, rtol=1e-6)
  np.testing.assert_allclose(
    records['perfect']['kl_clean_spliced'], 0, atol=1e-6
  )
  np.testing.assert_allclose(records['perfect']['l0'], WIDTH, rtol=1e-3)


def test_gamma_of_a_halved_reconstruction_is_a_half():
  # Sam Marks's check of the paper's first version: x = 1, x_hat = 1/2.
  sums = {
    'predictions': 2.0, 'tokens': 2.0, 'variance': 2.0, 'ce_clean': 2.0,
    'ce_zero': 6.0, 'kl_zero': 8.0, 'ce_mean': 4.0, 'kl_mean': 4.0,
    'ce_spliced': 3.0, 'kl_spliced': 1.0, 'l0': 2.0, 'error': 0.5,
    'x_hat_squared': 0.5, 'dot': 1.0, 'cosine': 2.0,
  }  # fmt: skip
  assert set(sums) == {*metrics.OF_SITE, *metrics.OF_SAE}
  sums = {k: np.array([v]) for k, v in sums.items()}
  record = metrics.record(sums, np.array([2.0, 0.0]))
  assert record['gamma'] == 0.5
  assert record['loss_recovered'] == 0.75
  assert record['loss_recovered_mean_ablation'] == 0.5
  assert record['log_loss_unrecovered'] == np.log(0.25)
  assert record['kl_clean_spliced'] == 0.5 and record['kl_zero_ablation'] == 4
  assert record['explained_variance'] == 0.75
  assert record['alive_fraction'] == 0.5 and record['num_tokens'] == 2
  assert record['dead_features'] == 1 and record['dense_features'] == 1
  # One document says nothing of how documents differ.
  assert set(record['intervals'].values()) == {None}


def test_saes_go_in_groups_that_fit(embedded, contexts, saes, monkeypatch):
  layout = layout_of(embedded, 'tensor', model=4)
  want = evaluate(embedded, contexts, saes, parallel='mesh')
  devices = devices_lib.Devices('mesh', layout)
  size = sum(devices._bytes(k, v) for k, v in saes['gated'][2].items())
  # Features are divided by four, b_dec is everywhere.
  assert size == 4 * (2 * WIDTH * FEATURES // 4 + 3 * FEATURES // 4 + WIDTH)
  many = {f'{k}{i}': v for k, v in saes.items() for i in range(2)}
  assert [len(g) for g in devices.groups(many)] == [4]

  class Small:
    def memory_stats(self):
      return {'bytes_limit': 2.5 * size / devices_lib.SHARE}

  mesh = type('Mesh', (), {'local_devices': [Small()], 'shape': {'model': 4}})
  monkeypatch.setattr(devices, 'layout', type('L', (), {'mesh': mesh})())
  monkeypatch.setattr(devices, '_bytes', lambda k, v: size * (k == 'W_dec'))
  groups = devices.groups(many)
  assert [list(g) for g in groups] == [
    ['gated0', 'gated1'],
    ['relu0', 'relu1'],
  ]
  # The clean pass is made again for each, and gives the same.
  monkeypatch.setattr(
    devices_lib.Devices,
    'groups',
    lambda self, s: [{k: v} for k, v in s.items()],
  )
  got = evaluate(embedded, contexts, saes, parallel='mesh')
  for name, record in want.items():
    assert_equal(flat(got[name]), flat(record), rtol=1e-6)


def test_pmap_wants_whole_models(embedded):
  with pytest.raises(
    UserError, match="eval.parallel: with 'pmap' every device"
  ):
    devices_lib.Devices('pmap', layout_of(embedded, 'fully_sharded'))
  assert devices_lib.Devices('auto', layout_of(embedded)).pmapped


def test_logits_are_compared_a_few_positions_at_a_time(
  embedded, contexts, saes, on_four, monkeypatch
):
  # One position of two contexts a device; nothing else is left.
  monkeypatch.setattr(devices_lib.Devices, 'logits', lambda *_: 2 * 2048)
  got = evaluate(embedded, contexts, saes)
  for name, record in on_four.items():
    assert_equal(flat(got[name]), flat(record))
  shape = (8, LENGTH)
  ids = jax.ShapeDtypeStruct(shape, np.int32)
  mask = jax.ShapeDtypeStruct(shape, np.bool_)
  hidden = jax.ShapeDtypeStruct((*shape, WIDTH), np.float32)

  def temporary(limit):
    fn = functools.partial(passes.comparison, embedded.module, 1, limit)
    lowered = jax.jit(fn).lower(
      embedded.params, ids, mask, hidden, (hidden,) * 3
    )
    return lowered.compile(QUICK).memory_analysis().temp_size_in_bytes

  whole = 8 * LENGTH * 2048 * 4
  assert temporary(2**25) > whole > 2 * temporary(8 * 2048)
