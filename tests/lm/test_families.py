"""Every family against transformers' PyTorch, from files that it saved."""

import jax
import numpy as np
import pytest

from gsae_jax.lm.weights import load_language_model
from tests.support import forward
from tests.support.golden import marked_cases, read_cases

# A second each, for PyTorch's model. Golden numbers hold all configurations.
pytestmark = pytest.mark.integration


@pytest.fixture(scope='session')
def families():
  """The models of PyTorch, which takes seconds to import."""
  why = 'PyTorch, the reference, is not installed'
  pytest.importorskip('torch', reason=why)
  from tests.support import families

  return families


@pytest.fixture(scope='module', params=marked_cases(pytest.mark.slow))
def pair(request, tmp_path_factory, families):
  """A model of PyTorch, and ours from the files that it was saved in."""
  folder = tmp_path_factory.mktemp(request.param)
  model = families.make(request.param)
  families.save(model, folder)
  lm = load_language_model(str(folder), revision=None, dtype='float32')
  return model, lm


def close(got, want, name, tolerance=2e-5):
  error, size = np.abs(np.asarray(got) - want).max(), np.abs(want).max()
  assert error <= tolerance * size, (name, error, size)


def test_logits_and_all_sites_equal_pytorch(pair, families):
  model, lm = pair
  ids = families.random_ids()
  logits, taken = forward.run(lm, ids)
  want_logits, want = families.run(model, ids)
  close(logits, want_logits, 'logits')
  assert len(taken) == 4 * families.LAYERS
  assert set(taken) == set(want)
  for site in taken:
    close(taken[site], want[site], site)
    # Neither side is trivial.
    assert want[site].std() > 1e-3 and want_logits.std() > 1e-2


def test_zeros_at_a_site_equal_a_hook_that_zeroes_it(pair, families):
  model, lm = pair
  ids = families.random_ids()
  clean, _ = families.run(model, ids)
  zeros = np.zeros(ids.shape, np.float32)
  for site in lm.module.config.site_widths():
    if not site.endswith('.1'):
      continue
    logits, _ = forward.run(lm, ids, gains={site: zeros})
    want, _ = families.run(model, ids, zeroed=site)
    close(logits, want, site)
    assert np.abs(want - clean).max() > 1e-3, site


def test_the_identity_at_every_site_is_the_same_program(pair, families):
  _, lm = pair
  ids = families.random_ids()
  same = dict.fromkeys(lm.module.config.site_widths(), lambda x: x)
  clean, edited = (
    str(
      jax.make_jaxpr(
        lambda p, edits=edits: lm.module.apply({'params': p}, ids, edits=edits)
      )(lm.params)
    )
    for edits in ({}, same)
  )
  assert edited == clean


def test_an_edit_at_one_position_changes_no_earlier_logits(pair, families):
  _, lm = pair
  ids = families.random_ids()
  clean, _ = forward.run(lm, ids)
  gain = np.ones(ids.shape, np.float32)
  gain[:, 23] = 0
  for site in ('attn_pre_linear.0', 'mlp_out.1', 'resid_post.1'):
    edited, _ = forward.run(lm, ids, gains={site: gain})
    np.testing.assert_array_equal(edited[:, :23], clean[:, :23])
    assert np.abs(edited - clean)[:, 23].max() > 1e-3


def test_the_golden_numbers_are_of_all_of_them(families):
  assert list(families.CASES) == list(read_cases())
