"""Passes that start at a site, and what directions do to the logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsae_jax.evaluation import passes
from gsae_jax.lm.effects import direct_logits
from gsae_jax.lm.weights import load_language_model
from tests.lm.golden import read_cases, write_model

IDS = np.random.default_rng(0).integers(0, 96, (2, 40)).astype(np.int32)
MASK = np.random.default_rng(1).random(IDS.shape) < 0.8
KINDS = 'attn_pre_linear', 'mlp_hidden', 'mlp_out', 'resid_post'


def load(tmp_path, name):
  write_model(tmp_path, name)
  return load_language_model(str(tmp_path), revision=None, dtype='float32')


@pytest.mark.parametrize('name', read_cases())
def test_a_pass_from_the_site_on_is_the_whole_pass(name, tmp_path):
  lm = load(tmp_path, name)
  for site in [f'{kind}.{i}' for kind in KINDS for i in (0, 1)]:
    hidden, taken = passes.clean_pass(lm.module, (site,), lm.params, IDS).kept
    new = -0.5 * taken[site] + 0.1
    got = passes._spliced(lm.module, site, lm.params, IDS, MASK, taken, new)
    edit = lambda x: jnp.where(MASK[..., None], -0.5 * x + 0.1, x)
    want, _ = lm.module.apply(
      {'params': lm.params}, IDS, edits={site: edit}, output='hidden'
    )
    largest = np.abs(want).max()
    np.testing.assert_allclose(got, want, atol=2e-6 * largest, err_msg=site)
    assert np.abs(got - hidden).max() > 1e-3 * largest


def test_what_lies_in_front_of_the_site_is_not_run_again(tmp_path):
  lm = load(tmp_path, 'llama')

  def flops(fn, *args):
    compiled = jax.jit(fn).lower(*args).compile()
    return compiled.cost_analysis()['flops']

  whole = flops(
    lambda p, ids: lm.module.apply({'params': p}, ids, output='hidden')[0],
    lm.params,
    IDS,
  )
  found = []
  for kind in KINDS:
    for layer in range(lm.module.config.layers):
      site = f'{kind}.{layer}'
      _, taken = passes.clean_pass(lm.module, (site,), lm.params, IDS).kept
      run = functools.partial(passes._spliced, lm.module, site)
      cost = flops(run, lm.params, IDS, MASK, taken, taken[site])
      found.append(cost / whole)
  by_kind = np.array(found).reshape(len(KINDS), -1)
  # A third of the blocks less from layer to layer, and nothing behind the last.
  assert np.all(np.diff(by_kind) < -0.3)
  assert by_kind[-1, -1] < 0.02
  # Within a block: attention's output matrix and the MLP, the MLP's, nothing.
  assert np.all(np.diff(by_kind, axis=0) < 0)


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'gemma2', 'neox_flags'])
def test_the_direct_effect_of_a_direction(name, tmp_path):
  lm = load(tmp_path, name)
  config, rng = lm.module.config, np.random.default_rng(0)
  p = jax.tree.map(lambda v: np.asarray(v, np.float64), lm.params)
  for site in [f'{kind}.1' for kind in KINDS]:
    d = rng.normal(size=(5, config.site_widths()[site]))
    got = direct_logits(config, lm.params, site, jnp.float32(d))
    block = p['block_1']
    norm = lambda d, w: (
      (d - d.mean(-1, keepdims=True) * (config.norm == 'layernorm'))
      * (w + (config.norm == 'rmsnorm_offset'))
    )
    if site.startswith('attn'):
      d = d @ block['attn']['W_O']
    if site.startswith('mlp_hidden'):
      d = d @ block['mlp']['W_out']
    if config.post_norms and 'attn' in site:
      d = norm(d, block['ln1_post']['scale'])
    if config.post_norms and 'hidden' in site:
      d = norm(d, block['ln2_post']['scale'])
    d = norm(d, p['ln_final']['scale'])
    want = d @ (p['W_E'].T if config.tied_embeddings else p['W_U'])
    want -= want.mean(-1, keepdims=True)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_a_direct_effect_is_what_a_nudge_does(tmp_path):
  # Of the last layer's residual stream, where nothing but the norm lies between:
  # in the limit of the norm's own direction held fixed.
  lm = load(tmp_path, 'llama')
  config = lm.module.config
  site = f'resid_post.{config.layers - 1}'
  d_D = np.random.default_rng(0).normal(size=config.width).astype(np.float32)

  def logits(edit):
    out, taken = lm.module.apply(
      {'params': lm.params}, IDS[:1], sites=(site,), edits={site: edit}
    )
    return np.asarray(out[0, -1]), np.asarray(taken[site][0, -1])

  before, x = logits(lambda x: x)
  # Orthogonal to x, so that its norm does not change to first order.
  d_D -= x * (d_D @ x) / (x @ x)
  after, _ = logits(lambda x: x + 1e-2 * d_D)
  change = after - before
  change -= change.mean()
  (want,) = direct_logits(config, lm.params, site, d_D[None])
  cosine = change @ want / np.linalg.norm(change) / np.linalg.norm(want)
  assert cosine > 0.9999
