"""Resampling of dead features."""

import shutil

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.errors import Preempted
from gsae_jax.training import resampling
from gsae_jax.training.checkpoints import Checkpoints
from gsae_jax.training.members import make_recipe
from tests.support import reference
from tests.support.training import (
  DYING,
  member,
  mesh_of,
  open_loader,
  settings,
  start,
  states,
  train,
  turned,
)


def test_draws_have_odds_of_the_loss_squared():
  losses = np.array([1.0, 2.0, 3.0, 0.0])
  draw = lambda seed: resampling.draw_rows(losses, 2, entropy=(1, seed))
  drawn = np.array([draw(seed) for seed in range(4000)])
  first = np.bincount(drawn[:, 0], minlength=4) / len(drawn)
  np.testing.assert_allclose(first, np.array([1, 4, 9, 0]) / 14, atol=0.025)
  # The second is one of the others, with the same odds among them.
  behind = drawn[drawn[:, 0] == 2, 1]
  share = np.bincount(behind, minlength=4) / len(behind)
  np.testing.assert_allclose(share, [0.2, 0.8, 0, 0], atol=0.03)
  np.testing.assert_array_equal(draw(7), draw(7))


def test_an_input_is_drawn_once_as_long_as_there_are_others():
  # Or two features would start, and stay, the same.
  losses = np.random.default_rng(0).exponential(size=500) ** 4
  drawn = resampling.draw_rows(losses, 400, entropy=(3,))
  assert len(set(drawn)) == 400
  few = np.zeros(500)
  few[[3, 8]] = 1.0
  drawn = resampling.draw_rows(few, 5, entropy=(3,))
  assert sorted(np.bincount(drawn)[[3, 8]]) == [2, 3]


def test_inputs_whose_loss_is_not_a_number_are_not_drawn():
  losses = np.array([1.0, np.nan, 2.0, np.inf, 1e200])
  drawn = resampling.draw_rows(losses, 2, entropy=(0,))
  assert set(drawn) == {0, 2}


def test_dead_features_start_anew_and_the_others_do_not_move(store, rng):
  for architecture, encoder in (('gated', 'W_gate'), ('relu', 'W_enc')):
    one = member(architecture=architecture)
    run = start(store, (one,), settings())
    fresh = states(run)['a']
    ones = jax.tree.map(np.ones_like, fresh.opt_state.nu)
    params = {k: np.asarray(v) + 0.1 for k, v in fresh.params.items()}
    state = fresh._replace(
      params=params, opt_state=fresh.opt_state._replace(nu=ones)
    )
    dead = np.arange(64) % 3 == 0
    drawn = rng.normal(size=(64, 16)).astype(np.float32)
    module = run.groups[0].module
    new = turned(resampling.resample(turned(state), dead, drawn, module=module))
    direction = drawn - params['b_dec']
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    np.testing.assert_allclose(
      new.params['W_dec'][dead], direction[dead], rtol=1e-5
    )
    alive_norm = np.linalg.norm(params[encoder], axis=0)[~dead].mean()
    np.testing.assert_allclose(
      new.params[encoder][:, dead],
      0.2 * alive_norm * direction[dead].T,
      rtol=1e-4,
    )
    for name, old in params.items():
      new_p, nu = new.params[name], new.opt_state.nu[name]
      if name == 'b_dec':
        np.testing.assert_array_equal(new_p, old)
        np.testing.assert_array_equal(nu, 1)
        continue
      part = (
        (lambda a, i: a[i]) if name == 'W_dec' else (lambda a, i: a[..., i])
      )
      np.testing.assert_array_equal(part(new_p, ~dead), part(old, ~dead))
      np.testing.assert_array_equal(part(nu, dead), 0)
      np.testing.assert_array_equal(part(nu, ~dead), 1)
      if name not in ('W_dec', encoder):
        np.testing.assert_array_equal(part(new_p, dead), 0)


@pytest.mark.integration
def test_a_run_resamples_at_its_steps_and_says_so(store, tmp_path):
  members = (member(l1=30.0),)
  events = train(store, tmp_path / 'yes', members, settings(**DYING))
  (event,) = [e for e in events if 'resampled' in e]
  assert event['step'] == 20 and event['member'] == 'a'
  assert event['resampled'] > 0
  before = [e for e in events if e.get('step') == 20 and 'l0' in e]
  after = [e for e in events if e.get('step') == 21 and 'l0' in e]
  assert after[0]['l0'] > before[0]['l0']
  assert after[0]['learning_rate'] < 0.2 * before[0]['learning_rate']


@pytest.mark.integration
def test_a_resumed_run_resamples_alike(store, tmp_path):
  members = (member(l1=30.0),)
  s = settings(**DYING)
  whole = train(store, tmp_path / 'whole', members, s)
  train(store, tmp_path / 'cut', members, s, stop_at=22)
  # As if killed behind the event: the checkpoint at 20 is the latest.
  shutil.rmtree(tmp_path / 'cut' / 'checkpoints' / '22')
  assert train(store, tmp_path / 'cut', members, s) == whole
  shapes = {'W_dec': [64, 16], 'W_gate': [16, 64]}
  saved = []
  for name in ('whole', 'cut'):
    with Checkpoints(str(tmp_path / name), read_only=True) as c:
      saved.append(c.restore_params(24, {'a': shapes})['a'])
  for name in shapes:
    np.testing.assert_array_equal(saved[0][name], saved[1][name])


SPREAD = {'data': 2, 'model': 2}


@pytest.mark.integration
@pytest.mark.parametrize(
  ('variant', 'mesh'),
  [
    ({}, {}),
    ({}, SPREAD),
    ({'encoder': 'untied'}, {}),
    pytest.param({'encoder': 'untied'}, SPREAD, marks=pytest.mark.slow),
    ({'architecture': 'relu'}, {}),
    pytest.param({'architecture': 'relu'}, SPREAD, marks=pytest.mark.slow),
  ],
)
def test_dead_features_are_revived_and_only_they_are_touched(
  variant, mesh, store
):
  # A run that is made to have dead features: their gates are shut for good.
  one = member(l1=0.05, **variant)
  s = settings(steps=200, dead_after=8, warmup_steps=0, l1_warmup_steps=0)
  mesh = mesh_of(**mesh)
  run = start(store, (one,), s, mesh=mesh)
  loader = open_loader(store, (one,), s)
  batches = loader.batches(NamedSharding(mesh, P('data')), start=0)
  bias = 'b_enc' if 'architecture' in variant else 'b_gate'
  shut = np.arange(64) % 4 == 0
  state = states(run)['a']
  params = dict(state.params)
  params[bias] = jax.device_put(
    np.where(shut, -100, 0).astype(np.float32), params[bias].sharding
  )
  run.groups[0].put({'a': turned(state._replace(params=params))})
  for _ in range(12):
    run.step(next(batches))
  before = jax.device_get(states(run)['a'])
  np.testing.assert_array_equal(before.steps_since_fired >= 8, shut)
  resample = resampling.Resampler(
    run.groups, loader, s, make_recipe(s).schedule, mesh
  )
  (event,) = resample(12, {}, lambda: False)
  assert event == {
    'step': 12, 'tokens': 12 * 128, 'member': 'a', 'resampled': 16
  }  # fmt: skip
  after = jax.device_get(states(run)['a'])
  assert after.opt_state.count == before.opt_state.count
  for name, old in before.opt_state.nu.items():
    new = after.opt_state.nu[name]
    axis = 0 if name == 'W_dec' else -1
    if name != 'b_dec':
      assert not np.compress(shut, new, axis).any()
      np.testing.assert_array_equal(
        np.compress(~shut, new, axis), np.compress(~shut, old, axis)
      )
    else:
      np.testing.assert_array_equal(new, old)
  fired = np.zeros(64, bool)
  for _ in range(40):
    run.step(next(batches))
    fired |= np.asarray(states(run)['a'].steps_since_fired) == 0
  assert fired[shut].mean() > 0.9


def test_inputs_are_drawn_by_the_whole_loss(store):
  one = member(l1=0.7)
  run = start(store, (one,), settings())
  state, (group,) = states(run)['a'], run.groups
  x = open_loader(store, (one,), settings()).rows_at(0, 'resid_post.0')
  hyper = group.members[0].hyper
  schedule = make_recipe(settings(l1_warmup_steps=4)).schedule
  got = resampling.row_losses(group.module, schedule, turned(state), hyper, x)
  p = {k: np.asarray(v, np.float64) for k, v in state.params.items()}
  for i in (0, 5, 77):
    # At step 0 of 4, the coefficient is a quarter.
    row = np.float64(x[i : i + 1]) * hyper.scale
    loss, *_ = reference.gated_loss_and_gradients(p, row, 0.7 / 4)
    np.testing.assert_allclose(got[i], loss, rtol=1e-5)


def test_draws_are_of_the_members_own_seed(store):
  # Three members in the same state, of two seeds.
  members = tuple(
    member(name, seed=seed) for name, seed in (('a', 0), ('b', 0), ('c', 1))
  )
  s = settings()
  run = start(store, members, s)
  first = states(run)['a']
  dead = first.steps_since_fired.at[::4].set(100)
  for group in run.groups:
    (name,) = group.names
    own = group.states()[name].rng
    one = first._replace(steps_since_fired=dead, rng=own)
    group.put({name: turned(one)})
  resample = resampling.Resampler(
    run.groups, open_loader(store, members, s), s, make_recipe(s).schedule,
    mesh_of(),
  )  # fmt: skip
  resample(5, {}, lambda: False)
  a, b, c = (np.asarray(states(run)[k].params['W_dec']) for k in 'abc')
  np.testing.assert_array_equal(a, b)
  assert (a != c).any(1).sum() > 10
  np.testing.assert_array_equal(
    np.delete(a, np.s_[::4], 0), np.delete(c, np.s_[::4], 0)
  )


def test_inputs_without_loss_are_drawn_alike():
  drawn = resampling.draw_rows(np.zeros(4), 1000, entropy=(1,))
  assert np.bincount(drawn, minlength=4).min() > 200


def test_each_batch_is_read_twice_for_a_site_whoever_is_dying(store):
  members = (
    member('a'), member('b', site='mlp_out.0'), member('c'), member('d', l1=1.0)
  )  # fmt: skip
  s = settings(dead_after=1)
  run = start(store, members, s)
  for group in run.groups:
    (name,) = group.names
    state = group.states()[name]
    silent = state.steps_since_fired.at[::4].set(100)
    group.put({name: state._replace(steps_since_fired=silent)})
  inner, asked = open_loader(store, members, s), []

  class Counting:
    def rows_at(self, step, site):
      asked.append((site, step))
      return inner.rows_at(step, site)

  resample = resampling.Resampler(
    run.groups, Counting(), s, make_recipe(s).schedule, mesh_of()
  )
  before = jax.device_get(states(run))
  # Whoever is asked to leave in the middle has replaced nothing.
  answers = iter([False] * 9 + [True])
  with pytest.raises(Preempted):
    resample(3, {}, lambda: next(answers))
  jax.tree.map(
    np.testing.assert_array_equal, before, jax.device_get(states(run))
  )
  asked.clear()
  resample(3, {}, lambda: False)
  once = [3, 4, 5, 6]  # 512 rows in batches of 128.
  assert asked == [
    (site, step)
    for site in ('resid_post.0', 'mlp_out.0')
    for step in once + once
  ]
