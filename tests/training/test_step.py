"""The train step: its trajectory, its schedules, its meshes, its companions."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.mesh import make_mesh
from gsae_jax.training.members import build_members
from gsae_jax.training.schedule import Schedule
from tests.sae import reference
from tests.training import test_checkpoints as checkpoints
from tests.training.conftest import member, open_loader, settings


def run(store, members, train, *, mesh=(1, 1), seed=0):
  """Trains in memory; returns losses by member, and the members."""
  devices = jax.devices()[: mesh[0] * mesh[1]]
  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh(
    mesh, ('data', 'model'), axis_types=auto, devices=devices
  )
  built = build_members(members, train, store, mesh, seed)
  loader = open_loader(store, members, train, seed=seed)
  batches = loader.batches(NamedSharding(mesh, P('data')), start=0)
  losses = {m.name: [] for m in members}
  for _ in range(train.steps):
    batch = next(batches)
    for m in built:
      m.state, metrics = m.step(m.state, batch[m.config.site], m.hyper)
      losses[m.config.name].append(float(metrics['loss']))
  return losses, built


@pytest.mark.parametrize('architecture', ['gated', 'relu'])
def test_trajectory_equals_the_float64_reference(architecture, store):
  train = settings(steps=60, warmup_steps=0, l1_warmup_steps=0)
  one = member(architecture=architecture, features=48)
  losses, (built,) = run(store, (one,), train)
  fresh = build_members((one,), train, store, make_mesh(1, 4), 0)[0]
  p = {k: np.asarray(v, np.float64) for k, v in fresh.state.params.items()}
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
    got = np.asarray(built.state.params[name])
    np.testing.assert_allclose(got, p[name], atol=2e-4, err_msg=name)
  assert losses['a'][-1] < 0.5 * losses['a'][0]


@pytest.mark.parametrize('mesh', [(4, 1), (2, 2), (1, 4)])
def test_losses_are_those_of_one_device_on_every_mesh(mesh, store):
  members = (member('g'), member('r', architecture='relu', features=96))
  train = settings(steps=25)
  alone, _ = run(store, members, train)
  spread, built = run(store, members, train, mesh=mesh)
  for name in alone:
    np.testing.assert_allclose(spread[name], alone[name], rtol=1e-5)
  W_dec = built[0].state.params['W_dec']
  assert W_dec.sharding.shard_shape(W_dec.shape) == (64 // mesh[1], 16)
  nu = built[0].state.opt_state.nu['W_gate']
  assert nu.sharding.shard_shape(nu.shape) == (16, 64 // mesh[1])


def test_a_member_in_a_run_is_the_member_alone(store):
  members = (
    member('a', l1=0.05),
    member('b', l1=0.2, seed=3, learning_rate=1e-3),
    member('c', site='mlp_out.0'),
  )
  together, _ = run(store, members, settings())
  for one in members:
    alone, _ = run(store, (one,), settings())
    assert together[one.name] == alone[one.name]
  assert together['a'] != together['b']


def test_resampling_does_not_depend_on_company(store, tmp_path):
  s = settings(steps=24, dead_after=3, learning_rate=0.05, resample_steps=(20,))
  one, other = member('a', l1=30.0), member('b', l1=20.0)
  checkpoints.train(store, tmp_path / 'alone', (one,), s)
  lines = checkpoints.train(store, tmp_path / 'both', (other, one), s)
  assert any(e.get('resampled') for e in lines if e['member'] == 'a')
  alone = (tmp_path / 'alone' / 'metrics.jsonl').read_text().splitlines()
  assert [json.dumps(e) for e in lines if e['member'] == 'a'] == alone


def test_members_of_equal_shape_share_one_program(store):
  members = (member('a', l1=0.05), member('b', l1=0.2, seed=1))
  _, (a, b) = run(store, members, settings(steps=3))
  assert a.step is b.step
  assert a.step._cache_size() == 1


def test_normalisation_makes_units_irrelevant(store):
  # mlp_out.0 is twice resid_post.0.
  members = (member('a'), member('b', site='mlp_out.0'))
  losses, _ = run(store, members, settings())
  np.testing.assert_allclose(losses['a'], losses['b'], rtol=1e-5)
  raw, _ = run(store, members, settings(normalize=None))
  assert raw['b'][0] > 3 * raw['a'][0]


def test_decoder_rows_stay_unit_and_l0_falls_with_l1(store):
  members = (member('low', l1=0.01), member('high', l1=1.0))
  _, (low, high) = run(store, members, settings(steps=60))
  for m in (low, high):
    norms = np.linalg.norm(m.state.params['W_dec'], axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
  assert np.mean(high.state.params['b_gate']) < np.mean(
    low.state.params['b_gate']
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
