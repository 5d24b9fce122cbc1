"""Variants of the paper in training: what they change, and what they leave."""

import jax
import numpy as np
import pytest

from gsae_jax.restore import load
from tests.support import reference
from tests.support.training import (
  member,
  mesh_of,
  run_steps,
  settings,
  start,
  train,
)


def baseline_of(workdir):
  return lambda config: {
    k: np.asarray(v)
    for k, v in load(str(workdir), member=config.baseline_member).params.items()
  }


def shift(**changes):
  return member(
    's', architecture='rescale_shift', l1=0.0, baseline='run',
    baseline_member='r', **changes,
  )  # fmt: skip


@pytest.fixture(scope='module')
def baseline(store, tmp_path_factory):
  """A trained baseline that shrinks."""
  workdir = tmp_path_factory.mktemp('baseline')
  one = member('r', architecture='relu', l1=0.4)
  train(store, workdir, (one,), settings(steps=150))
  return workdir


@pytest.mark.integration
def test_rescale_and_shift_learns_two_vectors_on_a_frozen_baseline(
  store, baseline, tmp_path
):
  s = settings(steps=150)
  lines = train(store, tmp_path, (shift(),), s, baseline=baseline_of(baseline))
  before, after = load(str(baseline)), load(str(tmp_path))
  for name in ('W_enc', 'b_enc', 'W_dec', 'b_dec'):
    np.testing.assert_allclose(
      after.params[name], before.params[name], rtol=1e-6
    )
  assert np.abs(after.params['r_mag']).max() > 0.01
  logged = [r for r in lines if 'loss' in r]
  assert logged[-1]['gamma'] > logged[0]['gamma'] + 0.02
  assert abs(logged[-1]['gamma'] - 1) < 0.04
  # It goes on without the baseline.
  train(store, tmp_path / 'a', (shift(),), s, stop_at=70,
                    baseline=baseline_of(baseline))  # fmt: skip
  assert train(store, tmp_path / 'a', (shift(),), s) == lines


@pytest.mark.integration
def test_rescale_and_shift_starts_as_its_baseline_whatever_the_scale(
  store, baseline
):
  x = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32) * 9
  for normalize in (None, 'mean_squared_norm'):
    run = start(
      store, (shift(),), settings(normalize=normalize),
      baseline=baseline_of(baseline), mesh=mesh_of(model=4),
    )  # fmt: skip
    module, (group,) = run.groups[0].module, run.groups
    scale = group.members[0].hyper.scale
    params = jax.device_get(group.states()['s'].params)
    f = module.apply({'params': params}, x * scale)['f'] / scale
    np.testing.assert_allclose(f, load(str(baseline)).encode(x), atol=1e-4)


@pytest.mark.integration
def test_frozen_features_are_not_resampled(store, baseline, tmp_path):
  lines = train(
    store, tmp_path, (shift(),),
    settings(resample_steps=(20,), dead_after=1),
    baseline=baseline_of(baseline),
  )  # fmt: skip
  assert not any('resampled' in r for r in lines)


# Of the others, gradients and trajectories are tested, and what they are loaded as
# is the same code.
_ONE = 'untied_norms_free'


@pytest.mark.parametrize(
  'variant',
  [
    pytest.param(
      v, marks=pytest.mark.integration if v == _ONE else pytest.mark.slow
    )
    for v in reference.VARIANTS
    if v != 'rescale_shift'
  ],
)
def test_every_variant_trains_and_is_loaded_as_what_it_is(
  variant, store, tmp_path
):
  architecture, options = reference.VARIANTS[variant]
  one = member('v', architecture=architecture, features=32, **options)
  lines = train(store, tmp_path, (one,), settings(steps=40))
  losses = [r['loss'] for r in lines if 'loss' in r]
  assert losses[-1] < 0.8 * losses[0]
  sae = load(str(tmp_path))
  assert {k: sae.config[k] for k in options} == options
  x = store.array('resid_post.0/activations')[:256].read().result()
  error = ((sae(x) - x) ** 2).sum()
  assert error < 0.9 * ((x - x.mean(0)) ** 2).sum()
  _, trained, _ = run_steps(store, (one,), settings(steps=40))
  assert sae.params.keys() == trained['v'].params.keys()
