"""Steps by some features at a time: gradients, steps, which is taken when."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsae_jax import sae
from gsae_jax.errors import UserError
from gsae_jax.sae import make_module, tiles
from gsae_jax.training import features as features_lib
from gsae_jax.training import groups, optimizer, programs
from gsae_jax.training.dense import Inputs, Recipe
from gsae_jax.training.programs import compile_step, ways
from gsae_jax.training.rows import whole_gradients
from gsae_jax.training.schedule import Schedule
from gsae_jax.training.state import init_member, key_data, shardings, turn
from gsae_jax.training.step import Hyperparameters
from tests.sae import reference
from tests.sae.test_gradients import D, F, activations, trained
from tests.training import test_checkpoints as checkpoints
from tests.training.conftest import (
  member,
  mesh_of,
  run_steps,
  settings,
  start,
)

MESHES = {'1': {}, '1x4': {'model': 4}, '2x2': {'data': 2, 'model': 2}}
RECIPE = Recipe(
  schedule=Schedule(10_000, 0, 0, 0, ()),
  dead_after=10,
  histogram_every=10,
  clip_norm=None,
  microbatches=1,
)


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
  monkeypatch.setattr(features_lib, '_BLOCK', 8)


def module_of(variant, width=D, features=F, **changes):
  architecture, options = reference.VARIANTS[variant]
  config = sae.VARIANTS | options | changes
  return make_module(
    config
    | {'architecture': architecture, 'width': width, 'features': features},
    precision=changes.get('precision', 'float32'),
    turned=True,
  )


def inputs_of(x, l1=0.1):
  scalars = (np.float32(v) for v in (l1, 0.7, 1e-3))
  return Inputs(jnp.asarray(x, jnp.float32), *scalars)


@functools.cache
def compiled(module, mesh, parts, way):
  return jax.jit(
    functools.partial(
      whole_gradients, module=module, mesh=mesh, parts=parts, way=way
    )
  )


def gradients(module, p, x, mesh, parts=1, way='sparse'):
  """Sums, firings and gradients, in the paper's shapes."""
  params = turn({k: jnp.asarray(v, jnp.float32) for k, v in p.items()})
  sums, fired, _, grads = compiled(module, mesh, parts, way)(
    params, inputs_of(x)
  )
  return sums, np.asarray(fired), turn(jax.device_get(grads))


def check(variant, p, x, mesh, parts=1, way='sparse'):
  """Equal to float64's, by the norm of each gradient."""
  architecture, options = reference.VARIANTS[variant]
  p = {k: np.asarray(v, np.float32).astype(np.float64) for k, v in p.items()}
  _, terms, want = reference.LOSSES[architecture](
    p, np.float64(np.float32(x)), 0.1, error_scale=0.7, **options
  )
  sums, fired, got = gradients(module_of(variant), p, x, mesh, parts, way)
  assert got.keys() == want.keys()
  for name in want:
    error = np.linalg.norm(got[name] - want[name])
    assert error <= 1e-6 * np.linalg.norm(want[name]), name
  for name, value in terms.items():
    np.testing.assert_allclose(getattr(sums, name) / len(x), value, rtol=2e-6)
  return sums, fired, got


def all_open(p):
  return p | {k: p[k] + 50 for k in ('b_gate', 'b_mag', 'b_enc') if k in p}


def all_shut(p):
  return p | {k: p[k] - 50 for k in ('b_gate', 'b_enc') if k in p}


@pytest.mark.parametrize(
  ('variant', 'mesh', 'way'),
  [
    *(('gated', mesh, 'sparse') for mesh in MESHES),
    ('no_r_mag', '1', 'sparse'),
    ('relu', '2x2', 'sparse'),
    ('gated', '2x2', 'blocked'),
    ('relu', '1', 'blocked'),
  ],
)
def test_gradients_equal_float64(variant, mesh, way, rng):
  module, p = trained(variant, rng)
  x = activations(rng, rows=128)
  mesh = mesh_of(**MESHES[mesh])
  random = {k: rng.normal(size=v.shape) / 4 for k, v in p.items()}
  random['b_dec'] = random['b_dec'] + 0.3
  for params in (random, p, all_open(p), all_shut(p)):
    check(variant, params, x, mesh, way=way)
  sums, fired, got = check(variant, all_shut(p), x, mesh, way=way)
  assert sums.open_share == 0 and not fired.any() and not got['W_dec'].any()
  sums, fired, _ = check(variant, all_open(p), x, mesh, way=way)
  assert sums.open_share == 1 and (fired == 128).all()
  sums, fired, _ = check(variant, p, x, mesh, way=way)
  assert 0.05 < sums.open_share < 0.95 and 0 < fired.sum() < fired.size * 60


def test_microbatches_add_up_to_the_batch(rng):
  _, p = trained('gated', rng)
  x = activations(rng, rows=128)
  whole, fired, _ = check('gated', p, x, mesh_of(data=2, model=2))
  parts, fired_parts, _ = check('gated', p, x, mesh_of(data=2, model=2), 4)
  np.testing.assert_array_equal(fired, fired_parts)
  np.testing.assert_allclose(whole.sparsity, parts.sparsity, rtol=1e-5)
  assert abs(whole.open_share - parts.open_share) < 0.02


@pytest.mark.parametrize('mesh', MESHES)
def test_unions_around_every_capacity(mesh, rng):
  # So many features of each device are open on so many of its rows, exactly, in
  # every tile: one less than there is room for, all, and one more.
  features, rows = 512, 128
  mesh = mesh_of(**MESHES[mesh])
  data, model = mesh.shape['data'], mesh.shape['model']
  own_features, own_rows = features // model, rows // data
  module = module_of('gated', features=features)
  p = turn(module.init(jax.random.key(3), jnp.zeros((1, D)))['params'])
  p = {k: np.asarray(v, np.float64) for k, v in p.items()}
  x = activations(rng, rows=rows)
  around = lambda sizes, total: {
    min(size + by, total) for size in sizes for by in (-1, 0, 1)
  }
  sizes = tiles.capacities(64, own_features, halves=False)
  for count in around(sizes, own_features):
    b_gate = np.full((model, own_features), -50.0)
    for own in b_gate:
      own[rng.permutation(own_features)[:count]] = 50
    b_gate = b_gate.reshape(-1)
    q = p | {'b_gate': b_gate, 'b_mag': b_gate / 2}
    sums, fired, _ = compare(module, q, x, mesh)
    np.testing.assert_allclose(sums.open_share, count / own_features, rtol=1e-6)
    assert (fired > 0).sum() == count * model
  sizes = tiles.capacities(16, own_rows, halves=True)
  W_gate = np.array(p['W_gate'])
  W_gate[0] = 1
  for count in around(sizes, own_rows):
    open_ = [rng.permutation(own_rows) < count for _ in range(data)]
    x[:, 0] = np.where(np.concatenate(open_), 40, -40)
    _, fired, _ = compare(module, p | {'W_gate': W_gate}, x, mesh)
    assert (fired == count * data).all()


def compare(module, p, x, mesh):
  p = {k: np.asarray(v, np.float32).astype(np.float64) for k, v in p.items()}
  _, _, want = reference.gated_loss_and_gradients(
    p, np.float64(np.float32(x)), 0.1, error_scale=0.7
  )
  found = gradients(module, p, x, mesh)
  for name, g in want.items():
    error = np.linalg.norm(found[2][name] - g)
    assert error <= 1e-6 * np.linalg.norm(g), name
  return found


def stepped(way, mesh, variant, x_nBD, start, recipe=RECIPE, **changes):
  """Metrics of each step, and the state behind them, in the paper's shapes."""
  module = module_of(variant, **changes)
  run = compile_step(module, recipe, mesh, stacked=False, way=way)
  state = init_member(module, key_data(0))
  state = state._replace(
    params=turn({k: jnp.asarray(v, jnp.float32) for k, v in start.items()})
  )
  state = jax.device_put(state, shardings(mesh, state))
  hyper = Hyperparameters(*(np.float32(v) for v in (1e-3, 0.1, 1.5, 0.7)))
  told = []
  for x_BD in x_nBD:
    state, metrics = run(state, (jnp.asarray(x_BD),), hyper, which=None)
    told.append(jax.device_get(metrics))
  return told, jax.device_get(state)


@pytest.mark.parametrize(
  ('variant', 'mesh'),
  [('gated', '1'), ('gated', '2x2'), ('relu', '1x4')],
)
def test_a_step_is_the_dense_one(variant, mesh, rng, monkeypatch):
  # Second moments get another divisor twice on the way, and most features are
  # shut for whole batches.
  monkeypatch.setattr(optimizer, 'REBASE', 7)
  _, start = trained(variant, rng)
  for name in ('b_gate', 'b_enc'):
    if name in start:
      start[name] = start[name] - rng.exponential(size=F)
  x_nBD = [activations(rng, rows=64) for _ in range(16)]
  mesh = mesh_of(**MESHES[mesh])
  want, dense = stepped('dense', mesh, variant, x_nBD, start)
  blocked, _ = stepped('blocked', mesh, variant, x_nBD, start)
  shares = [told.pop('open_share') for told in blocked]
  assert [told.pop('sparse_step') for told in blocked] == [0] * 16
  same_metrics(blocked, want)
  got, found = stepped('sparse', mesh, variant, x_nBD, start)
  for name, value in dense.params.items():
    np.testing.assert_allclose(
      found.params[name], value, atol=2e-6, err_msg=name
    )
    np.testing.assert_allclose(
      found.opt_state.nu[name], dense.opt_state.nu[name], rtol=2e-4, atol=1e-9
    )
  assert found.opt_state.count == dense.opt_state.count == 16
  np.testing.assert_array_equal(
    found.steps_since_fired, dense.steps_since_fired
  )
  np.testing.assert_array_equal(found.fired_counts, dense.fired_counts)
  assert (dense.steps_since_fired > 0).sum() > 10
  assert [told.pop('sparse_step') for told in got] == [1] * 16
  found_shares = [told.pop('open_share') for told in got]
  np.testing.assert_allclose(found_shares, shares, rtol=1e-6)
  np.testing.assert_array_equal(found.open_share, found_shares[-2:])
  same_metrics(got, want)


@pytest.mark.slow
def test_a_thousand_steps_end_at_the_same_weights(rng):
  # From initial weights, with half of the gates open at first and a few at last.
  directions = rng.normal(size=(100, 32))
  directions /= np.linalg.norm(directions, axis=1, keepdims=True)
  codes = rng.exponential(size=(1000, 64, 100))
  codes *= rng.random(codes.shape) < 0.03
  x_nBD = (0.2 * codes @ directions).astype(np.float32)
  size = {'width': 32, 'features': 128}
  fresh = init_member(module_of('gated', **size), key_data(0))
  start = jax.device_get(turn(fresh.params))
  run = lambda way: stepped(way, mesh_of(), 'gated', x_nBD, start, **size)
  told, dense = run('dense')
  _, found = run('sparse')
  l0 = [told[i]['l0'] for i in (0, -1)]
  assert l0[0] > 40 and l0[1] < 20, l0
  for name, value in dense.params.items():
    np.testing.assert_allclose(
      found.params[name], value, atol=1e-5, err_msg=name
    )
    assert np.abs(value - turn(start)[name]).max() > 0.05, name


def same_metrics(got, want):
  for a, b in zip(want, got, strict=True):
    assert a.keys() == b.keys()
    for name, value in a.items():
      if name == 'decoder_norm_error':
        # In a sparse step, of what moves; in all of them, rounding.
        assert max(value, b[name]) < 1e-6
      else:
        np.testing.assert_allclose(b[name], value, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize(
  'changes',
  [{'clip_norm': 0.5, 'microbatches': 4}, {'precision': 'bfloat16'}],
  ids=str,
)
def test_clipped_in_parts_and_rounded(changes, rng):
  _, start = trained('gated', rng)
  x_nBD = [activations(rng, rows=64) for _ in range(3)]
  precision = {k: v for k, v in changes.items() if k == 'precision'}
  recipe = dataclasses.replace(
    RECIPE, **{k: v for k, v in changes.items() if k != 'precision'}
  )
  both = [
    stepped(way, mesh_of(), 'gated', x_nBD, start, recipe, **precision)
    for way in ('dense', 'sparse')
  ]
  plain, _ = stepped('dense', mesh_of(), 'gated', x_nBD, start)
  (want, dense), (got, found) = both
  for name, value in dense.params.items():
    np.testing.assert_allclose(
      found.params[name], value, atol=2e-6, err_msg=name
    )
  for name in ('loss', 'l0', 'grad_norm'):
    np.testing.assert_allclose(got[-1][name], want[-1][name], rtol=2e-5)
  assert abs(want[-1]['loss'] / plain[-1]['loss'] - 1) > 1e-5


@pytest.mark.parametrize('members', ['looped', 'stacked'])
def test_parts_of_a_batch_train_as_the_whole(members, store):
  both = tuple(member(name, seed=i) for i, name in enumerate('ab'))
  train = settings(steps=8, members=members)
  want, whole, _ = run_steps(store, both, train)
  parts = dataclasses.replace(train, microbatches=4)
  got, found, _ = run_steps(store, both, parts, mesh=mesh_of(data=2, model=2))
  for name in 'ab':
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5)
    for k, value in whole[name].params.items():
      np.testing.assert_allclose(found[name].params[k], value, atol=2e-5)
  with pytest.raises(UserError, match='train.microbatches, 64'):
    start(
      store, both, dataclasses.replace(train, microbatches=64),
      mesh=mesh_of(data=4),
    )  # fmt: skip


@pytest.mark.parametrize('way', ['dense', 'blocked', 'sparse'])
def test_a_row_that_is_not_unit_is_told_of(way, rng):
  _, start = trained('gated', rng)
  start['b_gate'][4] = 50
  start['W_dec'][4] *= 1.01
  (told,), _ = stepped(way, mesh_of(), 'gated', [activations(rng)], start)
  np.testing.assert_allclose(told['decoder_norm_error'], 0.01, rtol=1e-3)


def test_a_weight_that_is_no_number_is_seen_in_the_loss(rng):
  _, start = trained('gated', rng)
  start['W_gate'][3, 5] = np.nan
  told, _ = stepped('sparse', mesh_of(), 'gated', [activations(rng)], start)
  assert np.isnan(told[0]['loss'])


def test_adam_is_optax_s_through_changes_of_the_divisor(rng, monkeypatch):
  import optax

  monkeypatch.setattr(optimizer, 'REBASE', 5)
  ours = optimizer.adam()
  theirs = optax.adam(-1.0, b1=0, b2=0.999, eps=1e-8)
  params = {'w': jnp.ones((4, 3))}
  a, b = ours.init(params), theirs.init(params)
  for i in range(23):
    g = {'w': jnp.asarray(rng.normal(size=(4, 3)) * (i % 3 > 0), jnp.float32)}
    got, a = ours.update(g, a)
    want, b = theirs.update(g, b)
    np.testing.assert_allclose(got['w'], want['w'], rtol=1e-5)
  monkeypatch.undo()
  assert 0.35 < 0.999**optimizer.REBASE < 1


@pytest.fixture
def eager(monkeypatch):
  """Small SAEs may take sparse steps, as soon as less than all is open."""
  monkeypatch.setattr(programs, '_WORTH_BLOCKS', 0)
  monkeypatch.setattr(groups, 'FEW', 0.9)


def test_a_run_goes_over_to_it_and_trains_the_same(store, eager):
  one = member(l1=3.0, learning_rate=1e-3)
  train = settings(steps=60)
  never = dataclasses.replace(train, sparse='never')
  losses, trained_, run = run_steps(store, (one,), never)
  assert list(run.groups[0]._steps) == ['blocked']
  got, found, run = run_steps(store, (one,), train)
  taken = {
    way: step._cache_size() for way, step in run.groups[0]._steps.items()
  }
  assert taken == {'blocked': 1, 'sparse': 1}  # And compiled once each.
  np.testing.assert_allclose(got['a'], losses['a'], rtol=1e-5)
  for name, value in trained_['a'].params.items():
    np.testing.assert_allclose(found['a'].params[name], value, atol=1e-4)


@pytest.mark.slow
def test_a_run_that_was_stopped_takes_the_same_steps(store, tmp_path, eager):
  # Around the change, too: what decides is in the checkpoint.
  one = member(l1=3.0, learning_rate=3e-3)
  s = settings(steps=36, log_every=1)
  whole = checkpoints.train(store, tmp_path / 'whole', (one,), s)
  ways_taken = [e['sparse_step'] for e in whole if 'sparse_step' in e]
  first = ways_taken.index(1)
  assert 0 < first < 30 and len(ways_taken) == 36
  for stop in (first + 1,):
    path = tmp_path / f'cut{stop}'
    checkpoints.train(store, path, (one,), s, stop_at=stop)
    lines = checkpoints.train(store, path, (one,), s)
    assert [e['loss'] for e in lines if 'loss' in e] == [
      e['loss'] for e in whole if 'loss' in e
    ]


def test_which_ways_there_are():
  gated, mesh = module_of('gated'), mesh_of()
  big = module_of('gated', width=512, features=8192)
  few = settings(batch_size=128)
  way = lambda module=gated, s=few, mesh=mesh, stacked=False: ways(
    s, module, mesh, stacked=stacked
  )
  always = dataclasses.replace(few, sparse='always')
  assert way() == ('dense',)  # Too small to be worth compiling.
  assert way(big) == ('blocked', 'sparse')
  assert way(big, dataclasses.replace(few, sparse='never')) == ('blocked',)
  assert way(s=always) == ('sparse',)
  assert way(big, stacked=True) == ('dense',)
  assert way(big, dataclasses.replace(few, batch_size=100)) == ('dense',)
  assert way(big, dataclasses.replace(few, clip_norm=1.0)) == ('blocked',)
  larger = module_of('gated', width=512, features=16384)
  for change in ({'microbatches': 2}, {'mesh': mesh_of(data=2)}):
    mesh_ = change.pop('mesh', mesh)
    s = dataclasses.replace(few, **change)
    assert way(larger, s, mesh=mesh_) == ('blocked',)
  assert way(larger, mesh=mesh_of(model=4)) == ('blocked', 'sparse')
  assert way(big, mesh=mesh_of(model=4)) == (
    'dense',
  )  # Each part is too small.
  for kwargs in (
    {'s': dataclasses.replace(always, batch_size=100)},
    {'module': module_of('untied'), 's': always},
    {'module': module_of('unfrozen'), 's': always},
    {'s': always, 'stacked': True},
  ):
    with pytest.raises(UserError, match='train.sparse'):
      way(**kwargs)
