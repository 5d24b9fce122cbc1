"""The strongest contexts of every feature, against sorting all of them."""

import jax
import numpy as np
import pytest

from gsae_jax.evaluation.splice import Evaluator
from gsae_jax.evaluation.top import empty_top, merged_tops, update
from tests.support.contexts import layout_of
from tests.support.untrained import TOKENS

SITE, K = 'mlp_out.0', 4


def sorted_by_hand(f_CLF, k):
  """Activations, contexts and positions `[F, k]`."""
  strongest_CF = f_CLF.max(1)
  found = []
  for feature in range(f_CLF.shape[2]):
    order = sorted(
      range(len(f_CLF)), key=lambda c: (-strongest_CF[c, feature], c)
    )
    rows = [
      (value, c, int(f_CLF[c, :, feature].argmax()))
      if (value := strongest_CF[c, feature]) > 0
      else (0.0, -1, -1)
      for c in order[:k]
    ]
    found.append(rows + [(0.0, -1, -1)] * (k - len(rows)))
  return np.array(found).transpose(2, 0, 1)


@pytest.mark.parametrize('k', [1, 3, 9])
@pytest.mark.parametrize('parts', [1, 2])
def test_batches_and_parts_find_what_sorting_finds(k, parts, rng):
  compiled = jax.jit(update)
  # Few values, so that many are equal, and a feature that never fires.
  f = rng.integers(0, 4, (6, 5, 7)).astype(np.float32)
  f[:, :, 3] = 0
  tops = []
  for part in range(parts):
    top = empty_top(7, k)
    for start in range(0, 6, 2):
      chosen = np.arange(start, start + 2)[part::parts]
      top = compiled(top, chosen, f[chosen])
    tops.append(jax.device_get(top))
  got = merged_tops(tops)
  for value, want in zip(got, sorted_by_hand(f, k), strict=True):
    np.testing.assert_array_equal(value, want)


@pytest.mark.integration
@pytest.mark.parametrize(
  ('parallel', 'kind', 'model'),
  [('pmap', 'replicated', 1), ('mesh', 'replicated', 1), ('mesh', 'tensor', 2)],
)
def test_the_evaluator_finds_them(
  parallel, kind, model, embedded, contexts, saes
):
  evaluator = Evaluator(
    embedded,
    contexts,
    tokens=TOKENS,
    batch_size=8,
    parallel=parallel,
    layout=layout_of(embedded, kind, model=model),
  )
  module, site, params = saes['gated']
  # Twice the same, so that logits of as many are compared as in test_splice.py, by
  # the same program.
  twice = dict.fromkeys(('it', 'again'), (module, site, params))
  (found,), (again,) = evaluator.run(twice, top_contexts=K).values()
  for one, other in zip(found.top, again.top, strict=True):
    np.testing.assert_array_equal(one, other)

  @jax.jit
  def by_definition(lm_params, params):
    _, taken = embedded.module.apply(
      {'params': lm_params}, contexts.ids_CL, sites=(site,), output=None
    )
    return taken[site], module.apply({'params': params}, taken[site])['f']

  x, f = map(np.asarray, by_definition(embedded.params, params))
  f = np.where(evaluator.mask_CL[..., None], f, 0)
  values, where, positions = sorted_by_hand(f, K)
  # Rounding of a product goes with the norms of its factors, not with what they
  # add up to; another division of the model adds up in another order.
  largest = np.linalg.norm(x - params['b_dec'], axis=-1).max()
  np.testing.assert_allclose(
    found.top.activations_FK, values, rtol=0, atol=1e-6 * largest
  )
  # A near-tie may fall either way in another program, and so may a gate.
  assert np.sum(found.top.contexts_FK != where) <= 4
  assert np.sum(found.top.positions_FK != positions) <= 4
  np.testing.assert_allclose(found.activation_F, f.sum((0, 1)), rtol=1e-4)
  assert np.abs(found.fired_F - (f > 0).sum((0, 1))).sum() <= 2
