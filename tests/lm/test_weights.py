"""The door for language models: every kind of broken folder has its line."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gsae_jax.errors import UserError
from gsae_jax.lm.weights import load_language_model
from tests.conftest import ROOT

EMBEDDED = ROOT / 'gsae_jax' / 'lm' / 'embedded'


@pytest.fixture
def folder(tmp_path):
  for name in ('config.json', 'model.safetensors', 'tokenizer.json'):
    shutil.copy(EMBEDDED / name, tmp_path)
  return tmp_path


def refuse(folder, match):
  with pytest.raises(UserError, match=match) as e:
    load_language_model(str(folder), revision=None, dtype='float32')
  assert '\n' not in str(e.value)
  assert str(e.value).startswith('lm.path: ')


def change_tensors(folder, change):
  tensors = load_file(folder / 'model.safetensors')
  change(tensors)
  save_file(tensors, folder / 'model.safetensors')


def test_a_copy_of_the_folder_is_the_same_model(folder, embedded):
  lm = load_language_model(str(folder), revision=None, dtype='float32')
  assert lm.identity == embedded.identity
  np.testing.assert_array_equal(lm.params['W_E'], embedded.params['W_E'])


def test_weights_change_the_identity(folder, embedded):
  change_tensors(folder, lambda t: t['embed.W_E'].__setitem__((0, 0), 9.0))
  lm = load_language_model(str(folder), revision=None, dtype='float32')
  assert lm.identity['weights'] != embedded.identity['weights']
  assert lm.identity['tokenizer'] == embedded.identity['tokenizer']


def test_truncated_and_missing_weights(folder):
  raw = (folder / 'model.safetensors').read_bytes()
  (folder / 'model.safetensors').write_bytes(raw[:-1000])
  refuse(folder, 'is truncated or not safetensors')
  (folder / 'model.safetensors').write_bytes(b'junk')
  refuse(folder, 'is truncated or not safetensors')
  (folder / 'model.safetensors').unlink()
  refuse(folder, 'has no model.safetensors')


def test_missing_unexpected_and_misshapen_tensors(folder):
  change_tensors(folder, lambda t: t.pop('blocks.0.attn.b_Q'))
  refuse(folder, 'lacks the tensor blocks.0.attn.b_Q')
  shutil.copy(EMBEDDED / 'model.safetensors', folder)
  change_tensors(folder, lambda t: t.update({'more': np.ones(3)}))
  refuse(folder, r'has 1 unexpected tensor\(s\), such as more')
  shutil.copy(EMBEDDED / 'model.safetensors', folder)
  change_tensors(folder, lambda t: t.update({'unembed.b_U': np.ones(2048)}))
  refuse(folder, r'has 1 unexpected tensor\(s\), such as unembed.b_U')
  shutil.copy(EMBEDDED / 'model.safetensors', folder)
  change_tensors(folder, lambda t: t.update({'ln_final.w': np.ones(3)}))
  refuse(folder, r'ln_final.w has shape \(3,\), which config.json does not')


def test_configs(folder):
  config = json.loads((folder / 'config.json').read_text())
  write = lambda c: (folder / 'config.json').write_text(json.dumps(c))
  write(config | {'model_type': 'mamba'})
  refuse(folder, "model_type 'mamba'; supported are gelu_1l, gemma, gemma2")
  del config['d_head']
  write(config)
  refuse(folder, "has no 'd_head'")
  (folder / 'config.json').write_text('{')
  refuse(folder, 'is not JSON')
  (folder / 'config.json').unlink()
  refuse(folder, 'has no config.json')


def test_llama_settings_that_are_not_supported(tmp_path):
  shutil.copytree(
    ROOT / 'tests/golden/tiny_llama', tmp_path, dirs_exist_ok=True
  )
  config = json.loads((tmp_path / 'config.json').read_text())
  scaled = {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 500.0}
  for change, match in (
    ({'rope_parameters': scaled}, "rotary scaling 'linear' is not supported"),
    ({'attention_bias': True}, 'attention_bias=True'),
    ({'hidden_act': 'gelu'}, "hidden_act='gelu'"),
  ):
    (tmp_path / 'config.json').write_text(json.dumps(config | change))
    refuse(tmp_path, match)


def test_tokenizers(folder):
  (folder / 'tokenizer.json').write_text('{}')
  refuse(folder, 'tokenizer.json is not a tokenizer')
  (folder / 'tokenizer.json').unlink()
  refuse(folder, 'has no tokenizer.json')


def test_sharded_weights_are_the_same_model(folder, embedded):
  tensors = load_file(folder / 'model.safetensors')
  names = sorted(tensors)
  parts = {'a.safetensors': names[:7], 'b.safetensors': names[7:]}
  for file, own in parts.items():
    save_file({k: tensors[k] for k in own}, folder / file)
  (folder / 'model.safetensors').unlink()
  index = {'weight_map': {k: f for f, own in parts.items() for k in own}}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  lm = load_language_model(str(folder), revision=None, dtype='float32')
  np.testing.assert_array_equal(
    lm.params['block_0']['mlp']['W_in'], embedded.params['block_0']['mlp']['W_in']
  )
  (folder / 'b.safetensors').unlink()
  refuse(folder, 'has no b.safetensors')


def test_a_hub_id_is_downloaded(folder, monkeypatch):
  asked = []

  def download(repo, *, revision, allow_patterns):
    asked.append((repo, revision))
    return str(folder)

  monkeypatch.setattr('huggingface_hub.snapshot_download', download)
  lm = load_language_model('org/name', revision='v1', dtype='float32')
  assert asked == [('org/name', 'v1')] and lm.module.config.width == 128


def test_a_hub_id_without_a_network(monkeypatch):
  def download(*args, **kwargs):
    raise OSError('no route')

  monkeypatch.setattr('huggingface_hub.snapshot_download', download)
  refuse(
    'org/name', "'org/name' is neither a folder nor could it be downloaded"
  )
  refuse('/nowhere/at/all', 'there is no folder /nowhere/at/all')


def test_another_models_tokenizer_is_refused(folder):
  config = json.loads((folder / 'config.json').read_text())
  change_tensors(
    folder, lambda t: t.update({'embed.W_E': t['embed.W_E'][:900]})
  )
  change_tensors(
    folder,
    lambda t: t.update({'unembed.W_U': t['unembed.W_U'][:, :900].copy()}),
  )
  (folder / 'config.json').write_text(json.dumps(config | {'d_vocab': 900}))
  refuse(folder, 'has ids up to 2047, and the model 900 embeddings')


def test_broken_settings_have_their_line(folder):
  (folder / 'tokenizer_config.json').write_text('{"bos_token": ')
  refuse(folder, 'tokenizer_config.json is not JSON')
  (folder / 'tokenizer_config.json').unlink()
  (folder / 'config.json').write_text('[]')
  refuse(folder, 'config.json is not a JSON object')
