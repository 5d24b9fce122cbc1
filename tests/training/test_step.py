"""The train step: its trajectory, its schedules, its meshes, its companions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.sae.gated import GatedSAE
from gsae_jax.training.schedule import Schedule
from tests.support import reference
from tests.support.training import (
  DYING,
  member,
  mesh_of,
  open_loader,
  run_steps,
  settings,
  start,
  states,
  train,
)


@pytest.mark.parametrize('architecture', ['gated', 'relu'])
def test_trajectory_equals_the_float64_reference(architecture, store, float64):
  train = settings(steps=60, warmup_steps=0, l1_warmup_steps=0)
  one = member(architecture=architecture, features=48)
  losses, trained, _ = run_steps(store, (one,), train)
  fresh = states(start(store, (one,), train, mesh=mesh_of(model=4)))['a']
  p = {k: np.asarray(v, np.float64) for k, v in fresh.params.items()}
  v = {k: np.zeros_like(w) for k, w in p.items()}
  loader = open_loader(store, (one,), train)
  # What is float32 in training is rounded here, too.
  scale = np.float32(store.sites['resid_post.0'].mean_squared_norm ** -0.5)
  l1, rate = (float(np.float32(v)) for v in (one.l1, train.learning_rate))
  gradients = {
    'gated': reference.gated_loss_and_gradients,
    'relu': reference.relu_loss_and_gradients,
  }[architecture]
  for step in range(train.steps):
    x = (loader.rows_at(step, 'resid_post.0') * scale).astype(np.float64)
    loss, _, g = gradients(p, x, l1)
    np.testing.assert_allclose(losses['a'][step], loss, rtol=1e-9)
    p, v = reference.adam_step(p, g, v, step + 1, rate)
  for name in p:
    got = np.asarray(trained['a'].params[name])
    np.testing.assert_allclose(got, p[name], atol=1e-11, err_msg=name)
  assert losses['a'][-1] < 0.5 * losses['a'][0]


@pytest.mark.integration
@pytest.mark.parametrize('data, model', [(4, 1), (2, 2), (1, 4)])
def test_losses_are_those_of_one_device_on_every_mesh(
  data, model, store, float64
):
  members = (member('g'), member('r', architecture='relu', features=96))
  train = settings(steps=25)
  alone, _, _ = run_steps(store, members, train)
  mesh = mesh_of(data=data, model=model)
  spread, trained, _ = run_steps(store, members, train, mesh=mesh)
  for name in alone:
    np.testing.assert_allclose(spread[name], alone[name], rtol=1e-9)
  W_dec = trained['g'].params['W_dec']
  assert W_dec.sharding.shard_shape(W_dec.shape) == (64 // model, 16)
  nu = trained['g'].opt_state.nu['W_gate']
  assert nu.sharding.shard_shape(nu.shape) == (16, 64 // model)


def test_a_member_in_a_run_is_the_member_alone(store):
  members = (
    member('a', l1=0.05),
    member('b', l1=0.2, seed=3, learning_rate=1e-3),
    member('c', site='mlp_out.0'),
  )
  together, _, _ = run_steps(store, members, settings())
  for one in members:
    alone, _, _ = run_steps(store, (one,), settings())
    assert together[one.name] == alone[one.name]
  assert together['a'] != together['b']


@pytest.mark.integration
def test_resampling_does_not_depend_on_company(store, tmp_path):
  s = settings(**DYING)
  one, other = member('a', l1=30.0), member('b', l1=20.0)
  alone = train(store, tmp_path / 'alone', (one,), s)
  lines = train(store, tmp_path / 'both', (other, one), s)
  assert any(e.get('resampled') for e in lines if e['member'] == 'a')
  assert [e for e in lines if e['member'] == 'a'] == alone


def test_members_of_equal_shape_share_one_program(store):
  members = (member('a', l1=0.05), member('b', l1=0.2, seed=1))
  _, _, run = run_steps(store, members, settings(steps=3))
  a, b = run.groups
  assert a._steps['dense'] is b._steps['dense']
  assert a._steps['dense']._cache_size() == 1


def test_normalisation_makes_units_irrelevant(store):
  # mlp_out.0 is twice resid_post.0.
  members = (member('a'), member('b', site='mlp_out.0'))
  losses, _, _ = run_steps(store, members, settings())
  np.testing.assert_allclose(losses['a'], losses['b'], rtol=1e-5)
  raw, _, _ = run_steps(store, members, settings(normalize=None))
  assert raw['b'][0] > 3 * raw['a'][0]


def test_decoder_rows_stay_unit_and_gates_shut_with_l1(store):
  members = (member('low', l1=0.01), member('high', l1=1.0))
  _, trained, _ = run_steps(store, members, settings(steps=60))
  for state in trained.values():
    norms = np.linalg.norm(state.params['W_dec'], axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
  assert np.mean(trained['high'].params['b_gate']) < np.mean(
    trained['low'].params['b_gate']
  )


def logged(store, members, train, **kwargs):
  """The metrics of every step, of a run in memory."""
  run = start(store, members, train, **kwargs)
  loader = open_loader(store, members, train)
  batches = loader.batches(NamedSharding(mesh_of(), P('data')), start=0)
  return [
    jax.device_get(run.step(next(batches))) for _ in range(train.steps)
  ], run


def test_metrics_are_what_they_are_called(store, float64):
  one = member(l1=3.0, learning_rate=0.01)
  train = settings(steps=25, dead_after=1, batch_size=16)
  found, run = logged(store, (one,), train)
  metrics = found[-1][('a',)]
  # The state before the last step, and its batch.
  _, before, _ = run_steps(
    store, (one,), settings(steps=24, dead_after=1, batch_size=16)
  )
  p = {k: np.asarray(v, np.float64) for k, v in before['a'].params.items()}
  loader = open_loader(store, (one,), train)
  site = store.sites['resid_post.0']
  scale = np.float32(site.mean_squared_norm**-0.5)
  x = loader.rows_at(24, 'resid_post.0') * scale
  x = x.astype(np.float64)
  loss, terms, g = reference.gated_loss_and_gradients(p, x, one.l1)
  z = (x - p['b_dec']) @ p['W_gate']
  f = np.maximum(np.exp(p['r_mag']) * z + p['b_mag'], 0) * (z + p['b_gate'] > 0)
  x_hat = f @ p['W_dec'] + p['b_dec']
  total = np.sqrt(sum((v**2).sum() for v in g.values()))
  want = terms | {
    'loss': loss,
    'l0': (f > 0).sum(1).mean(),
    'gamma': (x_hat**2).sum() / (x_hat * x).sum(),
    'grad_norm': total,
    **{f'grad_norm_{k}': np.linalg.norm(v) for k, v in g.items()},
    'learning_rate': one.learning_rate,
    'l1_coefficient': one.l1,
  }
  assert metrics.keys() == want.keys() | {
    'alive_fraction', 'decoder_norm_error'
  }  # fmt: skip
  for name, value in want.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
  assert metrics['decoder_norm_error'] < 1e-14
  silent = np.asarray(states(run)['a'].steps_since_fired)
  assert metrics['alive_fraction'] == (silent < 1).mean() < 1


def test_decoder_norms_go_free_where_the_penalty_has_them(store):
  one = member(sparsity='decoder_norm_l1')
  found, run = logged(store, (one,), settings(steps=40))
  norms = np.linalg.norm(states(run)['a'].params['W_dec'], axis=1)
  assert np.ptp(norms) > 0.01
  last = found[-1][('a',)]['decoder_norm_error']
  assert 0.5 * np.abs(norms - 1).max() < last < 1.5 * np.abs(norms - 1).max()


@pytest.mark.integration
def test_firings_are_counted_over_the_window_on_every_mesh(store, float64):
  one, train = member(l1=0.3), settings(steps=17, histogram_every=10)
  counts = []
  for mesh in (mesh_of(), mesh_of(data=2, model=2)):
    _, got, _ = run_steps(store, (one,), train, mesh=mesh)
    counts.append(np.asarray(got['a'].fired_counts))
  # Steps 10 to 16: L0 of each is the mean over its rows.
  found, _ = logged(store, (one,), train)
  l0 = [m[('a',)]['l0'] for m in found[10:]]
  assert counts[0].sum() == round(sum(l0) * train.batch_size)
  np.testing.assert_array_equal(counts[0], counts[1])


def test_clipping_bounds_the_gradient_that_is_used(store):
  # Adam with beta1 = 0 forgets the scale of a first gradient; the second moments
  # keep it.
  one = member()
  norms = {}
  for clip in (None, 0.25):
    s = settings(steps=1, clip_norm=clip)
    found, run = logged(store, (one,), s)
    nu = dict(jax.device_get(states(run)['a'].opt_state.nu))
    # Of all but W_dec, whose gradient is projected too.
    del nu['W_dec']
    used = np.sqrt(sum(v.sum(dtype=np.float64) for v in nu.values()) * 1000)
    norms[clip] = found[0][('a',)]['grad_norm'], used
  assert norms[None][0] == norms[0.25][0] > 0.5  # What is logged is before it.
  np.testing.assert_allclose(
    norms[0.25][1] / norms[None][1], 0.25 / norms[None][0], rtol=1e-3
  )


def test_losses_in_the_units_of_the_tables(store):
  # Multiplied by D, or by D and E||x||, the coefficient makes it the same run:
  # Adam knows no scale (paper D.1.1, section 2.4 of what is derived from it).
  site = store.sites['resid_post.0']
  mean_norm = site.mean_norm * site.mean_squared_norm**-0.5
  members = (
    member('sum', l1=0.3),
    member('mean', l1=0.3 / 16, loss_scale='mean'),
    member('norm', l1=0.3 / 16 / mean_norm, loss_scale='mean_over_norm'),
  )
  losses, _, _ = run_steps(store, members, settings(steps=15))
  for name, factor in (('mean', 16), ('norm', 16 * mean_norm)):
    scaled = np.array(losses[name]) * factor
    np.testing.assert_allclose(scaled, losses['sum'], rtol=1e-3)
  alone, _, _ = run_steps(
    store, (member('mean', l1=0.3 / 16),), settings(steps=15, loss_scale='mean')
  )
  assert alone['mean'] == losses['mean']


@pytest.mark.integration
def test_bfloat16_products_train_the_same_thing_nearly(store):
  members = (member('a'), member('r', architecture='relu'))
  exact, _, _ = run_steps(store, members, settings())
  rounded, trained, _ = run_steps(
    store, members, settings(precision='bfloat16')
  )
  for name in exact:
    np.testing.assert_allclose(rounded[name], exact[name], rtol=0.03)
    assert rounded[name] != exact[name]
  for leaf in jax.tree.leaves((trained['a'].params, trained['a'].opt_state.nu)):
    assert leaf.dtype == np.float32


def test_gates_that_bfloat16_flips():
  # Activations with a large mean. Gates are decided by what is left when
  # b_dec, which learns the mean, is taken off in float32; the rest is rounded.
  rng = np.random.default_rng(0)
  width, features, rows = 128, 1024, 2048
  x = rng.normal(size=(rows, width)) + 10.0
  W = rng.normal(size=(width, features)) / np.sqrt(width)
  params = {
    'W_dec': W.T, 'W_gate': W, 'b_gate': np.full(features, -2.0),
    'r_mag': np.zeros(features), 'b_mag': np.zeros(features),
    'b_dec': np.full(width, 10.0),
  }  # fmt: skip
  params = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}

  def gates(x, precision):
    module = GatedSAE(width=width, features=features, precision=precision)
    return np.asarray(module.apply({'params': params}, x)['pi_gate'] > 0)

  exact = gates(jnp.float32(x), 'float32')
  # Stored in bfloat16: the mean taken off before the cast, and not.
  stored = lambda v: jnp.asarray(v, jnp.bfloat16).astype(jnp.float32)
  flips = {
    name: (gates(values, precision) != exact).sum(1).mean()
    for name, values, precision in (
      ('products', jnp.float32(x), 'bfloat16'),
      ('centred store', stored(x - 10) + 10, 'bfloat16'),
      ('raw store', stored(x), 'bfloat16'),
    )
  }
  print('gates flipped per token, of', exact.sum(1).mean(), 'open:', flips)
  assert 0 < flips['products'] < 0.2
  assert flips['centred store'] < 1.6 * flips['products']
  assert flips['raw store'] > 4 * flips['products']


def test_learning_rate_follows_the_paper():
  s = Schedule(
    steps=100,
    warmup_steps=10,
    l1_warmup_steps=4,
    decay_steps=20,
    resample_steps=(40,),
  )
  rate = jax.jit(jax.vmap(s.learning_rate))(jnp.arange(101))
  np.testing.assert_allclose(rate[0], 0.1)
  np.testing.assert_allclose(rate[5], 0.55)  # Halfway along the cosine.
  np.testing.assert_allclose(rate[10:40], 1)
  np.testing.assert_allclose(rate[40:51], rate[:11])  # Again after resampling.
  np.testing.assert_allclose(rate[90], 0.5)
  np.testing.assert_allclose(rate[100], 0, atol=1e-7)
  np.testing.assert_allclose(
    [float(s.l1(i)) for i in range(6)], [0.25, 0.5, 0.75, 1, 1, 1]
  )
  flat = Schedule(100, 0, 0, 0, ())
  assert [float(flat.learning_rate(i)) for i in (0, 99)] == [1, 1]
  assert float(flat.l1(0)) == 1
