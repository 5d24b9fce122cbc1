"""The train step: its trajectory, its schedules, its meshes, its companions."""

import numpy as np
import pytest

from gsae_jax.training.schedule import Schedule
from tests.sae import reference
from tests.training import test_checkpoints as checkpoints
from tests.training.conftest import (
  member,
  mesh_of,
  open_loader,
  run_steps,
  settings,
  start,
  states,
)


@pytest.mark.parametrize('architecture', ['gated', 'relu'])
def test_trajectory_equals_the_float64_reference(architecture, store):
  train = settings(steps=60, warmup_steps=0, l1_warmup_steps=0)
  one = member(architecture=architecture, features=48)
  losses, trained, _ = run_steps(store, (one,), train)
  fresh = states(start(store, (one,), train, mesh=mesh_of(model=4)))['a']
  p = {k: np.asarray(v, np.float64) for k, v in fresh.params.items()}
  v = {k: np.zeros_like(w) for k, w in p.items()}
  loader = open_loader(store, (one,), train)
  scale = store.sites['resid_post.0'].mean_squared_norm ** -0.5
  gradients = {
    'gated': reference.gated_loss_and_gradients,
    'relu': reference.relu_loss_and_gradients,
  }[architecture]
  for step in range(train.steps):
    x = loader.rows_at(step, 'resid_post.0').astype(np.float64) * scale
    loss, _, g = gradients(p, x, one.l1)
    np.testing.assert_allclose(losses['a'][step], loss, rtol=2e-5)
    p, v = reference.adam_step(p, g, v, step + 1, train.learning_rate)
  for name in p:
    got = np.asarray(trained['a'].params[name])
    np.testing.assert_allclose(got, p[name], atol=2e-4, err_msg=name)
  assert losses['a'][-1] < 0.5 * losses['a'][0]


@pytest.mark.parametrize('data, model', [(4, 1), (2, 2), (1, 4)])
def test_losses_are_those_of_one_device_on_every_mesh(data, model, store):
  members = (member('g'), member('r', architecture='relu', features=96))
  train = settings(steps=25)
  alone, _, _ = run_steps(store, members, train)
  mesh = mesh_of(data=data, model=model)
  spread, trained, _ = run_steps(store, members, train, mesh=mesh)
  for name in alone:
    np.testing.assert_allclose(spread[name], alone[name], rtol=1e-5)
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


def test_resampling_does_not_depend_on_company(store, tmp_path):
  s = settings(steps=24, dead_after=3, learning_rate=0.05, resample_steps=(20,))
  one, other = member('a', l1=30.0), member('b', l1=20.0)
  alone = checkpoints.train(store, tmp_path / 'alone', (one,), s)
  lines = checkpoints.train(store, tmp_path / 'both', (other, one), s)
  assert any(e.get('resampled') for e in lines if e['member'] == 'a')
  assert [e for e in lines if e['member'] == 'a'] == alone


def test_members_of_equal_shape_share_one_program(store):
  members = (member('a', l1=0.05), member('b', l1=0.2, seed=1))
  _, _, run = run_steps(store, members, settings(steps=3))
  a, b = run.groups
  assert a._program is b._program
  assert a._program._cache_size() == 1


def test_normalisation_makes_units_irrelevant(store):
  # mlp_out.0 is twice resid_post.0.
  members = (member('a'), member('b', site='mlp_out.0'))
  losses, _, _ = run_steps(store, members, settings())
  np.testing.assert_allclose(losses['a'], losses['b'], rtol=1e-5)
  raw, _, _ = run_steps(store, members, settings(normalize=None))
  assert raw['b'][0] > 3 * raw['a'][0]


def test_decoder_rows_stay_unit_and_l0_falls_with_l1(store):
  members = (member('low', l1=0.01), member('high', l1=1.0))
  _, trained, _ = run_steps(store, members, settings(steps=60))
  for state in trained.values():
    norms = np.linalg.norm(state.params['W_dec'], axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
  assert np.mean(trained['high'].params['b_gate']) < np.mean(
    trained['low'].params['b_gate']
  )


def test_learning_rate_follows_the_paper():
  s = Schedule(
    steps=100,
    warmup_steps=10,
    l1_warmup_steps=4,
    decay_steps=20,
    resample_steps=(40,),
  )
  rate = [float(s.learning_rate(i)) for i in range(101)]
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
