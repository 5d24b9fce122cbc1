"""Passes that start at a site, and what directions do to the logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsae_jax.evaluation import passes
from gsae_jax.lm.effects import direct_logits
from gsae_jax.lm.weights import load_language_model
from tests.support.forward import QUICK
from tests.support.golden import marked_cases, write_model

IDS = np.random.default_rng(0).integers(0, 96, (2, 40)).astype(np.int32)
MASK = np.random.default_rng(1).random(IDS.shape) < 0.8
KINDS = 'attn_pre_linear', 'mlp_hidden', 'mlp_out', 'resid_post'


def load(tmp_path, name):
  write_model(tmp_path, name)
  return load_language_model(str(tmp_path), revision=None, dtype='float32')


# Where a pass starts depends on the kind of block: attention and MLP one after
# the other or beside each other, with norms behind them or without. Other
# configurations differ within their parts, which golden numbers hold.
KINDS_OF_BLOCKS = ('gpt2', 'neox', 'llama', 'gemma2')


@pytest.mark.integration
@pytest.mark.parametrize(
  'name', marked_cases(pytest.mark.slow, but=KINDS_OF_BLOCKS)
)
def test_a_pass_from_the_site_on_is_the_whole_pass(name, tmp_path):
  lm = load(tmp_path, name)
  sites = tuple(f'{kind}.{i}' for kind in KINDS for i in (0, 1))
  new = lambda x: -0.5 * x + 0.1

  @functools.partial(jax.jit, compiler_options=QUICK)
  def clean(params):
    return passes.clean_pass(lm.module, sites, params, IDS).kept

  @functools.partial(jax.jit, compiler_options=QUICK)
  def from_sites(params, taken):
    return {
      site: passes._spliced(
        lm.module, site, params, IDS, MASK, taken, new(taken[site])
      )
      for site in sites
    }

  @functools.partial(jax.jit, compiler_options=QUICK)
  def whole(params, edited):  # Whether each site is, so that one program does.
    edit = lambda site: (
      lambda x: jnp.where(edited[site] & MASK[..., None], new(x), x)
    )
    hidden, _ = lm.module.apply(
      {'params': params},
      IDS,
      edits={site: edit(site) for site in sites},
      output='hidden',
    )
    return hidden

  hidden, taken = clean(lm.params)
  got = from_sites(lm.params, taken)
  for site in sites:
    want = whole(lm.params, {name: name == site for name in sites})
    largest = np.abs(want).max()
    np.testing.assert_allclose(
      got[site], want, atol=2e-6 * largest, err_msg=site
    )
    assert np.abs(got[site] - hidden).max() > 1e-3 * largest


@pytest.mark.integration
def test_what_lies_in_front_of_the_site_is_not_run_again(tmp_path):
  lm = load(tmp_path, 'llama')

  def flops(fn, *args):
    lowered = jax.jit(fn).lower(*args)
    compiled = lowered.compile(compiler_options=QUICK)
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
      clean = functools.partial(passes.clean_pass, lm.module, (site,))
      _, taken = jax.eval_shape(clean, lm.params, IDS).kept
      run = functools.partial(passes._spliced, lm.module, site)
      cost = flops(run, lm.params, IDS, MASK, taken, taken[site])
      found.append(cost / whole)
  by_kind = np.array(found).reshape(len(KINDS), -1)
  # A third of the blocks less from layer to layer, and nothing behind the last.
  assert np.all(np.diff(by_kind) < -0.3)
  assert by_kind[-1, -1] < 0.02
  # Within a block: attention's output matrix and the MLP, the MLP's, nothing.
  assert np.all(np.diff(by_kind, axis=0) < 0)


@pytest.mark.integration
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


@pytest.mark.integration
def test_a_direct_effect_is_what_a_nudge_does(tmp_path):
  # Of the last layer's residual stream, where nothing but the norm lies between:
  # in the limit of the norm's own direction held fixed.
  lm = load(tmp_path, 'llama')
  config = lm.module.config
  site = f'resid_post.{config.layers - 1}'
  d_D = np.random.default_rng(0).normal(size=config.width).astype(np.float32)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def logits(params, nudge_D):
    out, taken = lm.module.apply(
      {'params': params},
      IDS[:1],
      sites=(site,),
      edits={site: lambda x: x + nudge_D[None, None]},
    )
    return out[0, -1], taken[site][0, -1]

  before, x = map(np.asarray, logits(lm.params, 0 * d_D))
  # Orthogonal to x, so that its norm does not change to first order.
  d_D -= x * (d_D @ x) / (x @ x)
  after, _ = logits(lm.params, 1e-2 * d_D)
  change = after - before
  change -= change.mean()
  (want,) = direct_logits(config, lm.params, site, d_D[None])
  cosine = change @ want / np.linalg.norm(change) / np.linalg.norm(want)
  assert cosine > 0.9999
