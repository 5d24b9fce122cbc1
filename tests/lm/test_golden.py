"""Every family against what PyTorch made of the same weights, without PyTorch.

And the names that the published files of some families have.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gsae_jax.errors import UserError
from gsae_jax.lm.families import FAMILIES
from gsae_jax.lm.weights import load_language_model
from tests.support import forward
from tests.support.golden import (
  FOLDER,
  OF_FAMILIES,
  marked_cases,
  read_cases,
  write_model,
)

# PyTorch's numbers are of the first row; with two, the program of a family is
# that of test_families.py.
IDS = np.random.default_rng(0).integers(0, 96, (2, 40)).astype(np.int32)
SITE = 'resid_post.2'


def run(folder, dtype='float32'):
  lm = load_language_model(str(folder), revision=None, dtype=dtype)
  logits, taken = forward.run(lm, IDS)
  return logits[:1], taken[SITE][:1]


@pytest.mark.parametrize('name', marked_cases(pytest.mark.integration))
def test_a_family_equals_pytorch(name, tmp_path):
  write_model(tmp_path, name)
  logits, x = run(tmp_path)
  golden = load_file(FOLDER / 'families.safetensors')
  for got, want in (
    (logits, golden[f'{name}/logits']),
    (x, golden[f'{name}/{SITE}']),
  ):
    assert np.abs(got - want).max() < 2e-5 * np.abs(want).max()
    assert want.std() > 0.1


@pytest.mark.integration
@pytest.mark.parametrize('name', marked_cases(pytest.mark.slow))
def test_bfloat16_errs_no_more_than_pytorch_does(name, tmp_path):
  write_model(tmp_path, name)
  logits, x = run(tmp_path, 'bfloat16')
  golden = load_file(FOLDER / 'families.safetensors')
  exact = golden[f'{name}/logits']
  error = lambda got: np.sqrt(np.mean((np.asarray(got) - exact) ** 2))
  ratio = error(logits) / error(golden[f'{name}/bfloat16'])
  assert x.dtype == 'bfloat16' and 0.1 < ratio < 1.15


def test_every_family_of_transformers_is_there():
  cases = read_cases()
  # Gemma 3 with pictures is a text model of other names; GELU-1L is no model of
  # transformers.
  for names in (cases, OF_FAMILIES):
    kinds = {cases[name]['config']['model_type'] for name in names}
    assert kinds == set(FAMILIES) - {'gelu_1l', 'gemma3'}


def rename(folder, change, more=()):
  path = folder / 'model.safetensors'
  tensors = {change(k): v for k, v in load_file(path).items()}
  head = tensors.get('model.embed_tokens.weight')
  buffer = np.ones((1, 2), np.uint8)
  for name in more:
    tensors[name] = head if name == 'lm_head.weight' else buffer
  save_file(tensors, path)


@pytest.mark.parametrize(
  'name, change, more',
  [
    (
      'gpt2',
      lambda k: k.removeprefix('transformer.'),
      ('h.0.attn.bias', 'h.1.attn.masked_bias'),
    ),
    (
      'neox',
      lambda k: k.replace('lm_head', 'embed_out'),
      (
        'gpt_neox.layers.0.attention.bias',
        'gpt_neox.layers.0.attention.masked_bias',
        'gpt_neox.layers.0.attention.rotary_emb.inv_freq',
      ),
    ),
    ('llama', lambda k: k, ('model.layers.0.self_attn.rotary_emb.inv_freq',)),
    # A tied head that was saved all the same.
    ('gemma', lambda k: k, ('lm_head.weight',)),
  ],
)
def test_names_and_buffers_of_published_files(name, change, more, tmp_path):
  write_model(tmp_path, name)
  want = run(tmp_path)
  rename(tmp_path, change, more)
  for a, b in zip(run(tmp_path), want, strict=True):
    np.testing.assert_array_equal(a, b)
  rename(tmp_path, lambda k: k, ('model.layers.0.something',))
  with pytest.raises(UserError, match='1 unexpected .*something'):
    run(tmp_path)


@pytest.mark.parametrize(
  'spelling',
  [
    {'hidden_act': 'gelu'},
    {'hidden_act': 'gelu', 'hidden_activation': None},
    {'hidden_act': 'gelu', 'hidden_activation': 'gelu_pytorch_tanh'},
    {},
  ],
)
def test_gemma_1_says_gelu_and_means_the_approximation(spelling, tmp_path):
  config = write_model(tmp_path, 'gemma')
  want = run(tmp_path)
  del config['hidden_act']
  (tmp_path / 'config.json').write_text(json.dumps(config | spelling))
  for a, b in zip(run(tmp_path), want, strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_head_that_is_not_the_tied_embeddings_is_refused(tmp_path):
  write_model(tmp_path, 'gemma')
  tensors = load_file(tmp_path / 'model.safetensors')
  embeddings = tensors['model.embed_tokens.weight']
  for head in (embeddings + 1, embeddings[:7].copy()):
    more = tensors | {'lm_head.weight': head}
    save_file(more, tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match='lm_head.weight differs from the emb'):
      run(tmp_path)


@pytest.mark.parametrize(
  'inside', ['language_model.model.', 'model.language_model.']
)
def test_gemma_3_with_pictures_is_its_text_model(inside, tmp_path):
  config = write_model(tmp_path, 'gemma3_scaled')
  want = run(tmp_path)
  rename(
    tmp_path,
    lambda k: inside + k.removeprefix('model.'),
    ('vision_tower.a.weight', 'multi_modal_projector.b'),
  )
  text_config = {k: v for k, v in config.items() if k != 'model_type'}
  pictured = {'model_type': 'gemma3', 'text_config': text_config}
  (tmp_path / 'config.json').write_text(json.dumps(pictured))
  for a, b in zip(run(tmp_path), want, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  'name, change',
  [
    ('gpt2', {'add_cross_attention': True}),
    ('gemma', {'use_bidirectional_attention': True}),
    ('gemma3_scaled', {'attn_logit_softcapping': 30.0}),
  ],
)
def test_settings_that_change_the_model_are_refused(name, change, tmp_path):
  config = write_model(tmp_path, name)
  (tmp_path / 'config.json').write_text(json.dumps(config | change))
  (field,) = change
  with pytest.raises(UserError, match=f'config.json has {field}='):
    run(tmp_path)


def test_an_unknown_kind_of_layer_is_refused(tmp_path):
  config = write_model(tmp_path, 'qwen3_flags')
  kinds = ['full_attention', 'full_attention', 'chunked_attention']
  (tmp_path / 'config.json').write_text(
    json.dumps(config | {'layer_types': kinds})
  )
  with pytest.raises(UserError, match='chunked_attention'):
    run(tmp_path)
