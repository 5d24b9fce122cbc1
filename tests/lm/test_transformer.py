"""The transformer against PyTorch's numbers, real text, and its own contract."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gsae_jax.errors import UserError
from gsae_jax.lm import text
from gsae_jax.lm.weights import load_language_model
from tests.support.locations import ROOT


def cross_entropy(lm, contexts, rows=16):
  """Mean over the predictions made from positions in the mask."""

  @jax.jit
  def losses(params, ids):
    logits, _ = lm.module.apply({'params': params}, ids)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits[:, :-1], ids[:, 1:]
    )

  total = count = 0.0
  for i in range(0, len(contexts.ids_CL) // rows * rows, rows):
    mask = contexts.mask_CL[i : i + rows, :-1]
    each = np.asarray(losses(lm.params, contexts.ids_CL[i : i + rows]))
    total += float(each[mask].sum())
    count += mask.sum()
  return total / count


@pytest.mark.integration
def test_real_llama_has_its_published_cross_entropy(stories):
  lm = load_language_model(str(stories[0]), revision=None, dtype='float32')
  documents = text.read_documents(str(stories[1]), '<|endoftext|>')
  contexts = text.pack(
    text.split(documents, 0.1, 'held_out'),
    lm.tokenizer,
    context_length=256,
    packing='documents',
    prepend_bos=True,
    special_tokens='drop',
    rows=50_000,
  )
  assert abs(cross_entropy(lm, contexts) - 1.275) < 0.03


@pytest.mark.integration
def test_real_llama_writes_its_published_story(stories):
  lm = load_language_model(str(stories[0]), revision=None, dtype='float32')

  @jax.jit
  def following(params, ids, n):
    logits, _ = lm.module.apply({'params': params}, ids)
    return jnp.argmax(logits[0, n - 1])

  ids = np.zeros((1, 256), np.int32)
  ids[0, 0] = lm.tokenizer.bos_id
  for n in range(1, 256):
    ids[0, n] = following(lm.params, ids, n)
  story = lm.tokenizer.decode(ids[0])
  assert len(story) == 564
  assert story == (
    'Once upon a time, there was a little girl named Lily. She loved to play '
    'outside in the park. One day, she saw a big, red ball. She wanted to play '
    "with it, but it was too high.\nLily's mom said, \"Lily, let's go to the "
    'park." Lily was sad and didn\'t know what to do. She said, "I want to '
    "play with your ball, but I can't find it.\"\nLily was sad and didn't know "
    'what to do. She said, "I\'m sorry, Lily. I didn\'t know what to do."\nLily '
    "didn't want to help her mom, so she said, \"I'm sorry, mom. I didn't know "
    'what to do." Her mom said, "Don\'t worry, Lily. We can help you'
  )


@pytest.mark.integration
def test_embedded_model_is_as_good_as_its_readme_says(embedded):
  folder = ROOT / 'gsae_jax' / 'lm' / 'embedded'
  results = json.loads((folder / 'results.json').read_text())
  documents = text.read_documents('stdlib', None)
  contexts = text.pack(
    text.split(documents, 0.1, 'held_out'),
    embedded.tokenizer,
    context_length=128,
    packing='stream',
    prepend_bos=True,
    special_tokens='drop',
    rows=40_000,
  )
  got = cross_entropy(embedded, contexts)
  # Another Python's library has other files, and the model saw some of them
  # in another version; here the first 40,000 of 260,000 tokens are measured.
  least = 0.3 if documents.digest == results['text_digest'] else 1.5
  assert -least < got - results['nats_per_token'] < 0.3
  assert got < results['bigram_nats_per_token'] - 0.4
  assert results['bigram_nats_per_token'] < results['unigram_nats_per_token']
  assert (folder / 'model.safetensors').stat().st_size < 4_000_000
  readme = (folder / 'README.md').read_text()
  for name in ('nats_per_token', 'bits_per_byte', 'bigram_nats_per_token'):
    assert f'{results[name]:.3f}' in readme


@pytest.fixture(scope='module')
def ids(embedded):
  rng = np.random.default_rng(0)
  return rng.integers(1, 2000, (3, 20)).astype(np.int32)


def test_nothing_sees_what_comes_later(embedded, ids):
  sites = tuple(embedded.module.config.site_widths())
  run = lambda x: embedded.module.apply(
    {'params': embedded.params}, x, sites=sites
  )
  changed = ids.copy()
  changed[:, 12:] = 7
  (a, a_sites), (b, b_sites) = run(ids), run(changed)
  a_sites, b_sites = a_sites | {'logits': a}, b_sites | {'logits': b}
  for name in a_sites:
    np.testing.assert_allclose(
      a_sites[name][:, :12], b_sites[name][:, :12], atol=1e-5
    )
    assert np.abs(a_sites[name] - b_sites[name])[:, 12:].max() > 1e-2


@pytest.mark.parametrize(
  'site', ['resid_post.0', 'mlp_out.0', 'attn_pre_linear.0', 'mlp_hidden.0']
)
def test_an_edit_is_what_the_rest_of_the_model_sees(embedded, ids, site):
  run = lambda **k: embedded.module.apply({'params': embedded.params}, ids, **k)
  clean, taken = run(sites=(site,))
  same, _ = run(edits={site: lambda x: taken[site]})
  np.testing.assert_allclose(same, clean, atol=1e-4)
  # Doubling a residual would not do: the norm behind it takes it back.
  flip = lambda x: x[..., ::-1]
  edited, after = run(sites=(site,), edits={site: flip})
  np.testing.assert_allclose(
    after[site], flip(taken[site]), rtol=1e-4, atol=1e-5
  )
  assert np.abs(edited - clean).max() > 0.1


def test_stopping_early_gives_the_same_activations(stories):
  lm = load_language_model(str(stories[0]), revision=None, dtype='float32')
  sites = ('mlp_hidden.1', 'attn_pre_linear.2')
  ids = np.arange(40, dtype=np.int32).reshape(2, 20)
  run = lambda **k: lm.module.apply(
    {'params': lm.params}, ids, sites=sites, **k
  )
  logits, early = run(output=None)
  assert logits is None
  for site, x in run()[1].items():
    np.testing.assert_allclose(early[site], x, atol=1e-5)


@pytest.mark.integration
def test_bfloat16_is_close_and_is_bfloat16(ids):
  lm = load_language_model('embedded', revision=None, dtype='bfloat16')
  exact = load_language_model('embedded', revision=None, dtype='float32')
  run = lambda m: m.module.apply(
    {'params': m.params}, ids, sites=('resid_post.0',)
  )
  (logits, taken), (_, want_taken) = run(lm), run(exact)
  x = taken['resid_post.0']
  assert x.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  error = np.abs(x.astype(np.float32) - want_taken['resid_post.0']).mean()
  assert error < 0.02 * np.abs(want_taken['resid_post.0']).mean()


def test_sites_that_the_model_lacks(embedded):
  config = embedded.module.config
  assert config.check_site('mlp_hidden.0') == 512
  with pytest.raises(UserError, match="'mlp_out.3' is past the last layer"):
    config.check_site('mlp_out.3')
  for site in ('mlp_ou.0', 'mlp_out', 'mlp_out.x'):
    with pytest.raises(UserError, match='a site is one of attn_pre_linear, '):
      config.check_site(site)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_products_of_float32_are_float32_on_every_device(dtype, ids):
  lm = load_language_model('embedded', revision=None, dtype=dtype)
  run = lambda p: lm.module.apply({'params': p}, ids)[0]
  text = str(jax.make_jaxpr(run)(lm.params))
  # Of both operands: queries, keys, values, scores, sums of values, output, two of
  # the MLP, logits.
  exact = text.count('Precision.HIGHEST')
  assert exact == (2 * 9 if dtype == 'float32' else 0)
  if dtype == 'float32':
    assert text.count('dot_general[') == 9
