"""Every family against transformers' PyTorch, from files that it saved."""

import numpy as np
import pytest

from gsae_jax.lm.families import FAMILIES
from gsae_jax.lm.weights import load_language_model

pytest.importorskip('torch', reason='PyTorch, the reference, is not installed')

from tests.lm import families  # noqa: E402

CASES = tuple(families.CASES)


@pytest.fixture(scope='module', params=CASES)
def pair(request, tmp_path_factory):
  """A model of PyTorch, and ours from the files that it was saved in."""
  folder = tmp_path_factory.mktemp(request.param)
  model = families.make(request.param)
  families.save(model, folder)
  lm = load_language_model(str(folder), revision=None, dtype='float32')
  return model, lm


def close(got, want, name, tolerance=2e-5):
  error, size = np.abs(np.asarray(got) - want).max(), np.abs(want).max()
  assert error <= tolerance * size, (name, error, size)


def test_logits_and_all_sites_equal_pytorch(pair):
  model, lm = pair
  ids = families.random_ids()
  sites = tuple(lm.module.config.site_widths())
  assert len(sites) == 4 * families.LAYERS
  logits, taken = lm.module.apply({'params': lm.params}, ids, sites=sites)
  want_logits, want = families.run(model, ids)
  close(logits, want_logits, 'logits')
  assert set(taken) == set(want)
  for site in sites:
    close(taken[site], want[site], site)
    # Neither side is trivial.
    assert want[site].std() > 1e-3 and want_logits.std() > 1e-2


def test_zeros_at_a_site_equal_a_hook_that_zeroes_it(pair):
  model, lm = pair
  ids = families.random_ids()
  clean, _ = families.run(model, ids)
  for site in lm.module.config.site_widths():
    if not site.endswith('.1'):
      continue
    logits, _ = lm.module.apply(
      {'params': lm.params}, ids, edits={site: np.zeros_like}
    )
    want, _ = families.run(model, ids, zeroed=site)
    close(logits, want, site)
    assert np.abs(want - clean).max() > 1e-3, site


def test_the_identity_at_every_site_changes_no_logit(pair):
  _, lm = pair
  ids = families.random_ids()
  same = dict.fromkeys(lm.module.config.site_widths(), lambda x: x)
  clean, _ = lm.module.apply({'params': lm.params}, ids)
  edited, _ = lm.module.apply({'params': lm.params}, ids, edits=same)
  np.testing.assert_array_equal(edited, clean)


def test_an_edit_at_one_position_changes_no_earlier_logits(pair):
  _, lm = pair
  ids = families.random_ids()
  clean, _ = lm.module.apply({'params': lm.params}, ids)
  for site in ('attn_pre_linear.0', 'mlp_out.1', 'resid_post.1'):
    edited, _ = lm.module.apply(
      {'params': lm.params},
      ids,
      edits={site: lambda x: x.at[:, 23].set(0.0)},
    )
    np.testing.assert_array_equal(edited[:, :23], clean[:, :23])
    assert np.abs(edited - clean)[:, 23].max() > 1e-3


def test_every_family_is_tried():
  tried = {families.make(name).config.model_type for name in families.CASES}
  # Gemma 3 with pictures is a text model of other names; GELU-1L is no model of
  # transformers.
  assert tried == set(FAMILIES) - {'gelu_1l', 'gemma3'}
