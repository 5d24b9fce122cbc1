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
from tests.support import reference
from tests.support.dictionaries import D, F, activations, trained, with_gaps
from tests.support.training import (
  member,
  mesh_of,
  run_steps,
  settings,
  start,
  train,
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
  # And second moments get another divisor twice in 16 steps.
  monkeypatch.setattr(features_lib, '_BLOCK', 8)
  monkeypatch.setattr(optimizer, 'REBASE', 7)


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
    ('gated', '1', 'sparse'),
    pytest.param('gated', '2x2', 'sparse', marks=pytest.mark.integration),
    pytest.param('gated', '1x4', 'sparse', marks=pytest.mark.slow),
    pytest.param('no_r_mag', '1', 'sparse', marks=pytest.mark.integration),
    pytest.param('relu', '2x2', 'sparse', marks=pytest.mark.integration),
    pytest.param('gated', '2x2', 'blocked', marks=pytest.mark.integration),
    ('relu', '1', 'blocked'),
  ],
)
def test_gradients_equal_float64(variant, mesh, way, rng):
  module, p = trained(variant, rng)
  mesh = mesh_of(**MESHES[mesh])
  random = {k: rng.normal(size=v.shape) / 4 for k, v in p.items()}
  random['b_dec'] = random['b_dec'] + 0.3
  x = with_gaps(activations(rng, rows=128), 64, random, p)
  for params in (random, p, all_open(p), all_shut(p)):
    check(variant, params, x, mesh, way=way)
  sums, fired, got = check(variant, all_shut(p), x, mesh, way=way)
  assert sums.open_share == 0 and not fired.any() and not got['W_dec'].any()
  sums, fired, _ = check(variant, all_open(p), x, mesh, way=way)
  assert sums.open_share == 1 and (fired == 64).all()
  sums, fired, _ = check(variant, p, x, mesh, way=way)
  assert 0.05 < sums.open_share < 0.95 and 0 < fired.sum() < fired.size * 30


@pytest.mark.integration
def test_microbatches_add_up_to_the_batch(rng):
  _, p = trained('gated', rng)
  x = with_gaps(activations(rng, rows=128), 64, p)
  whole, fired, _ = check('gated', p, x, mesh_of(data=2, model=2))
  parts, fired_parts, _ = check('gated', p, x, mesh_of(data=2, model=2), 4)
  np.testing.assert_array_equal(fired, fired_parts)
  np.testing.assert_allclose(whole.sparsity, parts.sparsity, rtol=1e-5)
  assert abs(whole.open_share - parts.open_share) < 0.02


@pytest.mark.integration
@pytest.mark.parametrize(
  'mesh', ['1', '2x2', pytest.param('1x4', marks=pytest.mark.slow)]
)
def test_unions_around_every_capacity(mesh, rng):
  # So many features of each device are open on so many of its rows, exactly, in
  # every tile: one less than there is room for, all, and one more. No gate is
  # nearer to its edge than 20.
  features, rows = 256, 64
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


@functools.cache
def program(module, recipe, mesh, way):
  """The step, compiled once for all tests of this file."""
  return compile_step(module, recipe, mesh, stacked=False, way=way)


def stepped(way, mesh, variant, x_nBD, start, recipe=RECIPE, **changes):
  """Metrics of each step, and the state behind them, in the paper's shapes."""
  module = module_of(variant, **changes)
  run = program(module, recipe, mesh, way)
  state = init_member(module, key_data(0))
  # Float64 with the fixture of that name, float32 without.
  params = turn({k: jnp.asarray(v, float) for k, v in start.items()})
  state = jax.device_put(state._replace(params=params), shardings(mesh, state))
  hyper = Hyperparameters(*(np.float32(v) for v in (1e-3, 0.1, 1.5, 0.7)))
  told = []
  for x_BD in x_nBD:
    state, metrics = run(state, (jnp.asarray(x_BD),), hyper, which=None)
    told.append(jax.device_get(metrics))
  return told, jax.device_get(state)


@pytest.mark.integration
@pytest.mark.parametrize(
  ('variant', 'mesh'),
  [('gated', '1'), ('gated', '2x2'), ('relu', '1x4')],
)
def test_a_step_is_the_dense_one(variant, mesh, rng, float64):
  # Most features are shut for whole batches.
  _, start = trained(variant, rng)
  for name in ('b_gate', 'b_enc'):
    if name in start:
      start[name] = start[name] - rng.exponential(size=F)
  x_nBD = [activations(rng, rows=32) for _ in range(16)]
  mesh = mesh_of(**MESHES[mesh])
  want, dense = stepped('dense', mesh, variant, x_nBD, start)
  blocked, _ = stepped('blocked', mesh, variant, x_nBD, start)
  shares = [told.pop('open_share') for told in blocked]
  assert [told.pop('sparse_step') for told in blocked] == [0] * 16
  same_metrics(blocked, want)
  got, found = stepped('sparse', mesh, variant, x_nBD, start)
  for name, value in dense.params.items():
    np.testing.assert_allclose(
      found.params[name], value, atol=1e-12, err_msg=name
    )
    np.testing.assert_allclose(
      found.opt_state.nu[name], dense.opt_state.nu[name], rtol=1e-9, atol=1e-18
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


@pytest.mark.integration
def test_a_thousand_steps_end_at_the_same_weights(rng, float64):
  # From initial weights, with half of the gates open at first and a few at last.
  # In float32 some of 3 million gates would be within rounding of their edges.
  directions = rng.normal(size=(75, D))
  directions /= np.linalg.norm(directions, axis=1, keepdims=True)
  codes = rng.exponential(size=(1000, 32, 75))
  codes *= rng.random(codes.shape) < 0.04
  x_nBD = (0.2 * codes @ directions).astype(np.float32)
  fresh = init_member(module_of('gated'), key_data(0))
  start = jax.device_get(turn(fresh.params))
  run = lambda way: stepped(way, mesh_of(), 'gated', x_nBD, start)
  told, dense = run('dense')
  _, found = run('sparse')
  l0 = [told[i]['l0'] for i in (0, -1)]
  assert l0[0] > 40 and l0[1] < 20, l0
  for name, value in dense.params.items():
    np.testing.assert_allclose(
      found.params[name], value, atol=1e-11, err_msg=name
    )
    assert np.abs(value - turn(start)[name]).max() > 0.05, name


def same_metrics(got, want):
  for a, b in zip(want, got, strict=True):
    assert a.keys() == b.keys()
    for name, value in a.items():
      if name == 'decoder_norm_error':
        # In a sparse step, of what moves; in all of them, rounding.
        assert max(value, b[name]) < 1e-14
      else:
        np.testing.assert_allclose(b[name], value, rtol=1e-9, err_msg=name)


@pytest.mark.integration
def test_clipped_in_parts(rng, float64):
  _, start = trained('gated', rng)
  x_nBD = [activations(rng, rows=32) for _ in range(3)]
  recipe = dataclasses.replace(RECIPE, clip_norm=0.5, microbatches=4)
  run = lambda way: stepped(way, mesh_of(), 'gated', x_nBD, start, recipe)
  (want, dense), (got, found) = map(run, ('dense', 'sparse'))
  plain, _ = stepped('dense', mesh_of(), 'gated', x_nBD, start)
  for name, value in dense.params.items():
    np.testing.assert_allclose(
      found.params[name], value, atol=1e-12, err_msg=name
    )
  for name in ('loss', 'l0', 'grad_norm'):
    np.testing.assert_allclose(got[-1][name], want[-1][name], rtol=1e-9)
  # Adam knows no scale, so clipping changes little; but a hundred times that.
  assert abs(want[-1]['loss'] / plain[-1]['loss'] - 1) > 1e-7
  assert min(m['grad_norm'] for m in want) > 0.5


@pytest.mark.integration
def test_rounded_to_bfloat16(rng):
  _, start = trained('gated', rng)
  # Rounding moves what gates see by 1e-3 or so, on both sides alike but where
  # float32 sums differ in the last bit, so only far gates are sure.
  x = with_gaps(activations(rng, rows=2000), 32, start, gap=2e-3)
  x_nBD = [x, activations(rng, rows=32), activations(rng, rows=32)]
  run = lambda way: stepped(
    way, mesh_of(), 'gated', x_nBD, start, precision='bfloat16'
  )
  (want, dense), (got, found) = map(run, ('dense', 'sparse'))
  for name in ('loss', 'l0', 'grad_norm'):
    np.testing.assert_allclose(got[0][name], want[0][name], rtol=2e-5)
  plain, _, _ = reference.gated_loss_and_gradients(
    start, 1.5 * np.float64(x), 0.1, error_scale=0.7
  )
  assert 1e-5 < abs(want[0]['loss'] / plain - 1) < 1e-2
  # Later gates may be flipped by rounding. One moves a feature's own weights, one
  # in 96, by up to a step; two are let pass.
  for name, value in dense.params.items():
    differ = np.abs(found.params[name] - value) > 2e-6
    assert differ.mean() < 2.5 / F, name


@pytest.mark.integration
@pytest.mark.parametrize(
  'members', [pytest.param('looped', marks=pytest.mark.slow), 'stacked']
)
def test_parts_of_a_batch_train_as_the_whole(members, store, float64):
  both = tuple(member(name, seed=i) for i, name in enumerate('ab'))
  train = settings(steps=8)
  want, whole, _ = run_steps(store, both, train)
  parts = dataclasses.replace(train, members=members, microbatches=4)
  got, found, _ = run_steps(store, both, parts, mesh=mesh_of(data=2, model=2))
  for name in 'ab':
    np.testing.assert_allclose(got[name], want[name], rtol=1e-9)
    for k, value in whole[name].params.items():
      np.testing.assert_allclose(found[name].params[k], value, atol=1e-12)
  with pytest.raises(UserError, match='train.microbatches, 64'):
    start(
      store, both, dataclasses.replace(train, microbatches=64),
      mesh=mesh_of(data=4),
    )  # fmt: skip


@pytest.mark.integration
@pytest.mark.parametrize('way', ['dense', 'blocked', 'sparse'])
def test_a_row_that_is_not_unit_is_told_of(way, rng, float64):
  _, start = trained('gated', rng)
  start['b_gate'][4] = 50
  start['W_dec'][4] *= 1.01
  x_nBD = [activations(rng, rows=32)]
  (told,), _ = stepped(way, mesh_of(), 'gated', x_nBD, start)
  np.testing.assert_allclose(told['decoder_norm_error'], 0.01, rtol=1e-3)


@pytest.mark.integration
def test_a_weight_that_is_no_number_is_seen_in_the_loss(rng, float64):
  _, start = trained('gated', rng)
  start['W_gate'][3, 5] = np.nan
  x_nBD = [activations(rng, rows=32)]
  told, _ = stepped('sparse', mesh_of(), 'gated', x_nBD, start)
  assert np.isnan(told[0]['loss'])


def test_adam_is_optax_s_through_changes_of_the_divisor(rng, monkeypatch, x64):
  import optax

  # In float64, where optax's own bias correction is exact. Of ours, the scalars
  # are float32.
  monkeypatch.setattr(optimizer, 'REBASE', 5)
  ours = optimizer.adam()
  theirs = optax.adam(-1.0, b1=0, b2=0.999, eps=1e-8)
  update_ours, update_theirs = jax.jit(ours.update), jax.jit(theirs.update)
  params = {'w': jnp.ones((4, 3))}
  a, b = ours.init(params), theirs.init(params)
  for i in range(23):
    g = {'w': jnp.asarray(rng.normal(size=(4, 3)) * (i % 3 > 0))}
    # Of float32 scalars here, and of what optax mixes there.
    with jax.numpy_dtype_promotion('standard'):
      got, a = update_ours(g, a)
      want, b = update_theirs(g, b)
    np.testing.assert_allclose(got['w'], want['w'], rtol=1e-6)
  monkeypatch.undo()
  assert 0.35 < 0.999**optimizer.REBASE < 1


@pytest.fixture
def eager(monkeypatch):
  """Small SAEs may take sparse steps, as soon as less than all is open."""
  monkeypatch.setattr(programs, '_WORTH_BLOCKS', 0)
  monkeypatch.setattr(groups, 'FEW', 0.9)


@pytest.mark.integration
def test_a_run_goes_over_to_it_and_trains_the_same(store, eager, float64):
  one = member(l1=3.0, learning_rate=1e-3)
  train = settings(steps=60, batch_size=32)
  never = dataclasses.replace(train, sparse='never')
  losses, trained_, run = run_steps(store, (one,), never)
  assert list(run.groups[0]._steps) == ['blocked']
  got, found, run = run_steps(store, (one,), train)
  taken = {
    way: step._cache_size() for way, step in run.groups[0]._steps.items()
  }
  assert taken == {'blocked': 1, 'sparse': 1}  # And compiled once each.
  np.testing.assert_allclose(got['a'], losses['a'], rtol=1e-9)
  for name, value in trained_['a'].params.items():
    np.testing.assert_allclose(found['a'].params[name], value, atol=1e-12)


@pytest.mark.integration
def test_a_run_that_was_stopped_takes_the_same_steps(
  store, tmp_path, eager, float64
):
  # Around the change, too: what decides is in the checkpoint.
  one = member(l1=3.0, learning_rate=3e-3)
  s = settings(steps=36, batch_size=32)
  whole = train(store, tmp_path / 'whole', (one,), s)
  ways_taken = [e['sparse_step'] for e in whole if 'sparse_step' in e]
  first = ways_taken.index(1)
  assert 0 < first < 30 and len(ways_taken) == 36
  for stop in (first + 1,):
    path = tmp_path / f'cut{stop}'
    train(store, path, (one,), s, stop_at=stop)
    lines = train(store, path, (one,), s)
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
