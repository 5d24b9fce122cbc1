"""Resampling of dead features."""

import shutil

import jax
import numpy as np

from gsae_jax.training import resampling
from gsae_jax.training.checkpoints import Checkpoints
from tests.training.conftest import member, settings, start, states
from tests.training.test_checkpoints import train


def test_draws_have_odds_of_the_loss_squared():
  losses = np.array([1.0, 2.0, 3.0, 0.0])
  drawn = resampling.draw_rows(losses, 20_000, entropy=(1, 2))
  share = np.bincount(drawn, minlength=4) / 20_000
  np.testing.assert_allclose(share, np.array([1, 4, 9, 0]) / 14, atol=0.015)
  again = resampling.draw_rows(losses, 20_000, entropy=(1, 2))
  np.testing.assert_array_equal(drawn, again)
  other = resampling.draw_rows(losses, 20_000, entropy=(1, 3))
  assert np.any(drawn != other)


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
    new = resampling.resample(state, dead, drawn, module=run.groups[0].module)
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


# A huge coefficient and rate shut gates, so that there are dead features.
DYING = {
  'steps': 40, 'dead_after': 5, 'l1_warmup_steps': 0, 'learning_rate': 0.05
}  # fmt: skip


def test_a_run_resamples_at_its_steps_and_says_so(store, tmp_path):
  members = (member(l1=30.0),)
  events = train(
    store, tmp_path / 'yes', members, settings(resample_steps=(30,), **DYING)
  )
  (event,) = [e for e in events if 'resampled' in e]
  assert event['step'] == 30 and event['member'] == 'a'
  assert event['resampled'] > 0
  before = [e for e in events if e.get('step') == 30 and 'l0' in e]
  after = [e for e in events if e.get('step') == 31 and 'l0' in e]
  assert after[0]['l0'] > before[0]['l0']
  assert after[0]['learning_rate'] < 0.2 * before[0]['learning_rate']


def test_a_resumed_run_resamples_alike(store, tmp_path):
  members = (member(l1=30.0),)
  s = settings(resample_steps=(30,), **DYING)
  whole = train(store, tmp_path / 'whole', members, s)
  train(store, tmp_path / 'cut', members, s, stop_at=31)
  # As if killed behind the event: the checkpoint at 30 is the latest.
  shutil.rmtree(tmp_path / 'cut' / 'checkpoints' / '31')
  assert train(store, tmp_path / 'cut', members, s) == whole
  shapes = {'W_dec': [64, 16], 'W_gate': [16, 64]}
  saved = []
  for name in ('whole', 'cut'):
    with Checkpoints(str(tmp_path / name), read_only=True) as c:
      saved.append(c.restore_params(40, {'a': shapes})['a'])
  for name in shapes:
    np.testing.assert_array_equal(saved[0][name], saved[1][name])
