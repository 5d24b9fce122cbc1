"""Contexts, and SAEs, that several files evaluate."""

import jax
import numpy as np
import pytest

from tests.support.contexts import held_out_contexts
from tests.support.untrained import LENGTH, TOKENS, leave_gaps, make_saes

SITES = 'mlp_out.0', 'attn_pre_linear.0'


@pytest.fixture(scope='session')
def contexts(embedded):
  return held_out_contexts(
    embedded, documents=20, characters=300, rows=TOKENS, context_length=LENGTH
  )


@pytest.fixture(scope='session')
def saes(embedded, contexts):
  """A gated and a ReLU SAE, whose features are robust to rounding here."""

  @jax.jit
  def run(params):
    _, taken = embedded.module.apply(
      {'params': params}, contexts.ids_CL, sites=SITES, output=None
    )
    return taken

  taken = run(embedded.params)
  found = make_saes()
  rows = [
    np.reshape(taken[site], (-1, taken[site].shape[-1])) for site in SITES
  ]
  leave_gaps(found, np.concatenate(rows))
  return found
