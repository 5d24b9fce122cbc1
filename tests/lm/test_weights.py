"""The door for language models: every kind of broken folder has its line."""

import json
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file

from gsae_jax.errors import UserError
from gsae_jax.lm.layouts import make_layout
from gsae_jax.lm.weights import load_language_model
from tests.support.contexts import layout_of
from tests.support.golden import write_model
from tests.support.locations import ROOT

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
  config = write_model(tmp_path, 'llama')
  longrope = {
    'rope_type': 'longrope', 'factor': 2.0, 'rope_theta': 500.0,
    'short_factor': [1.0] * 3, 'long_factor': [1.0] * 3,
    'original_max_position_embeddings': 32,
  }  # fmt: skip
  for change, match in (
    ({'rope_parameters': longrope}, "rotary scaling 'longrope' is not support"),
    ({'hidden_act': 'mish'}, "asks for the activation 'mish'; supported are"),
    ({'hidden_size': 'big'}, 'config.json: .*hidden_size'),
    ({'num_key_value_heads': 3}, 'config.json: .*'),
    ({'rms_norm_eps': None}, 'config.json: .*rms_norm_eps'),
    ({'quantization_config': {'bits': 4}}, 'has a quantization_config'),
    # What the file lacks is said, not computed without.
    (
      {'attention_bias': True},
      'lacks the tensor model.layers.0.self_attn..*bias',
    ),
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
    lm.params['block_0']['mlp']['W_in'],
    embedded.params['block_0']['mlp']['W_in'],
  )
  (folder / 'b.safetensors').unlink()
  refuse(folder, 'has no b.safetensors')


# Not twice what is needed, nor what is a pickle.
PUBLISHED = [
  'config.json', 'model-00001-of-00002.safetensors', 'tokenizer.json',
  'consolidated.safetensors', 'onnx/config.json', 'pytorch_model.bin',
]  # fmt: skip


def test_a_hub_id_is_downloaded(folder, monkeypatch):
  asked = []

  def download(repo, *, revision, allow_patterns, ignore_patterns):
    patterns = {
      'allow_patterns': allow_patterns,
      'ignore_patterns': ignore_patterns,
    }
    assert list(filter_repo_objects(PUBLISHED, **patterns)) == PUBLISHED[:3]
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


def test_tokens_behind_the_embeddings_may_be_there_and_not_be_used(folder):
  path = folder / 'tokenizer.json'
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  tokenizer.add_special_tokens(['<image>'])
  tokenizer.save(str(path))
  lm = load_language_model(str(folder), revision=None, dtype='float32')
  assert lm.tokenizer.encode(['x = 1'])[0]
  with pytest.raises(UserError, match="has the token '<image>', of id 2048"):
    lm.tokenizer.encode(['x = 1', 'a <image>'])


def test_what_a_tokenizer_was_last_used_with_is_forgotten(folder, embedded):
  path = folder / 'tokenizer.json'
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  tokenizer.enable_truncation(4)
  tokenizer.enable_padding(length=16)
  tokenizer.save(str(path))
  texts = ['x', 'import os\n' * 20]
  lm = load_language_model(str(folder), revision=None, dtype='float32')
  assert lm.tokenizer.encode(texts) == embedded.tokenizer.encode(texts)


def test_broken_settings_have_their_line(folder):
  (folder / 'tokenizer_config.json').write_text('{"bos_token": ')
  refuse(folder, 'tokenizer_config.json is not JSON')
  (folder / 'tokenizer_config.json').unlink()
  (folder / 'config.json').write_text('[]')
  refuse(folder, 'config.json is not a JSON object')


LAYOUTS = [
  ('replicated', 1),
  ('tensor', 2),
  ('tensor', 4),
  ('fully_sharded', 1),
  ('fully_sharded', 2),
]


def leaves(tree):
  return {
    '/'.join(k.key for k in path): value
    for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


@pytest.mark.parametrize(('kind', 'model'), LAYOUTS)
def test_each_device_gets_its_part(kind, model, embedded):
  layout = layout_of(embedded, kind, model=model)
  placed = leaves(embedded.load(layout.place))
  host = leaves(embedded.params)
  assert set(placed) == set(host)
  for path, value in placed.items():
    assert value.sharding.mesh.shape == {'data': 4 // model, 'model': model}
    np.testing.assert_array_equal(value, host[path], err_msg=path)
  held = {
    p: v.addressable_shards[0].data.size / v.size for p, v in placed.items()
  }
  by_model = 1 / model if kind != 'replicated' else 1
  by_both = 1 / 4 if kind == 'fully_sharded' else by_model
  for path, part in held.items():
    matrix = path.split('/')[-1].startswith('W_') and path != 'W_pos'
    if matrix:
      assert part == by_both, path
  for path in ('block_0/attn/b_Q', 'block_0/mlp/b_in'):
    assert held[path] == by_model
  assert held['ln_final/scale'] == held['block_0/attn/b_O'] == 1


@pytest.mark.integration
def test_what_cannot_be_divided_is_everywhere(tmp_path):
  # Two key heads over four devices.
  write_model(tmp_path, 'llama')
  lm = load_language_model(str(tmp_path), revision=None, dtype='float32')
  layout = layout_of(lm, 'tensor', model=4)
  params = lm.load(layout.place)
  parts = {
    p: v.addressable_shards[0].data.shape for p, v in leaves(params).items()
  }
  assert parts['block_1/attn/W_Q'] == (32, 1, 8)
  assert parts['block_1/attn/W_K'] == (32, 2, 8)
  assert parts['W_E'] == (24, 32) and parts['block_1/mlp/W_out'] == (12, 32)
  ids = np.arange(40, dtype=np.int32).reshape(2, 20)
  run = jax.jit(lambda p: lm.module.apply({'params': p}, ids)[0])
  np.testing.assert_allclose(run(params), run(lm.params), atol=2e-5)


def test_layouts_that_do_not_fit(embedded):
  for kind, model, match in (
    ('tensor', 1, "'tensor' divides the language model over mesh.model"),
    ('tensor', 3, 'of which the 4 device.s. of a process leave 1'),
  ):
    with pytest.raises(UserError, match=match):
      layout_of(embedded, kind, model=model)
  assert layout_of(embedded, 'auto', model=3).kind == 'replicated'
  # As far as it divides the devices: SAEs may go over many processes.
  for model, want in ((-1, 4), (8, 4), (6, 2), (3, 1)):
    layout = layout_of(embedded, 'fully_sharded', model=model)
    assert layout.mesh.shape['model'] == want


def test_auto_divides_what_a_device_cannot_hold(embedded):
  class Device:
    def __init__(self, stats):
      self.stats = stats

    def memory_stats(self):
      return self.stats

  config = embedded.module.config
  for stats, kind in (
    (None, 'replicated'),
    ({'bytes_limit': 16e9}, 'replicated'),
    ({'bytes_limit': 2e6}, 'fully_sharded'),
  ):
    layout = make_layout('auto', config, embedded.bytes, [Device(stats)], 1)
    assert layout.kind == kind


@pytest.mark.integration
def test_only_the_first_blocks_are_read(stories):
  lm = load_language_model(str(stories[0]), revision=None, dtype='float32')
  sites = ('mlp_out.1', 'resid_post.0')
  blocks = lm.module.config.blocks_for(sites)
  params = lm.load(blocks=blocks)
  assert set(params) == {'W_E', 'block_0', 'block_1'}
  ids = np.arange(40, dtype=np.int32).reshape(2, 20)
  run = jax.jit(
    lambda p: lm.module.apply({'params': p}, ids, sites=sites, output=None)[1]
  )
  want = run({name: lm.params[name] for name in params})
  for site, x in run(params).items():
    np.testing.assert_array_equal(x, want[site])


def test_tensors_of_other_kinds_are_named(folder):
  change_tensors(
    folder, lambda t: t.update({'embed.W_E': t['embed.W_E'].astype(np.int8)})
  )
  refuse(folder, 'embed.W_E is of I8; supported are F64, F32')
  shutil.copy(EMBEDDED / 'model.safetensors', folder)
  change_tensors(folder, lambda t: t.update({'q.zeros': np.ones(3, np.int32)}))
  refuse(folder, r'1 unexpected tensor\(s\), such as q.zeros')


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float64'])
def test_other_precisions_are_read_as_they_are(dtype, folder, embedded):
  kind = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
  change_tensors(
    folder, lambda t: t.update({k: v.astype(kind) for k, v in t.items()})
  )
  for asked in ('float32', 'bfloat16'):
    lm = load_language_model(str(folder), revision=None, dtype=asked)
    exact = embedded.params['block_0']['mlp']['W_in'].astype(kind)
    got = lm.params['block_0']['mlp']['W_in']
    assert got.dtype == asked
    np.testing.assert_array_equal(got, exact.astype(got.dtype))


def test_pickles_are_named_and_not_read(folder):
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  refuse(folder, r'no model.safetensors; pytorch_model.bin is a pickle, which')


def test_indices_that_are_wrong(folder):
  index = folder / 'model.safetensors.index.json'
  for content in ('{}', '{"weight_map": {"a": 3}}'):
    index.write_text(content)
    refuse(folder, 'index.json has no weight_map')
  shutil.copy(folder / 'model.safetensors', folder / 'b.safetensors')
  names = {'a': 'model.safetensors', 'b': 'b.safetensors'}
  index.write_text(json.dumps({'weight_map': names}))
  refuse(folder, 'has .* in two of its files')


# What a large model adds to a process that has read a small one of its family.
MEASURE = """
import sys
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)
from gsae_jax.lm.layouts import make_layout
from gsae_jax.lm.weights import load_language_model

def read(path):
  lm = load_language_model(path, revision=None, dtype='bfloat16')
  config = lm.module.config
  layout = make_layout('fully_sharded', config, lm.bytes, jax.devices(), 2)
  total = 0
  for _, value in lm.read(layout.place):  # As if it went to another memory.
    total += value.block_until_ready().size
    del value
  with open('/proc/self/status') as f:
    peak = f.read().split('VmHWM:')[1].split()[0]
  return total, int(peak) * 1024

small, large = sys.argv[1:]
_, before = read(small)
total, peak = read(large)
print(total, peak - before)
"""


# Models of 0.34 GB in files of 0.05 GB, and of 2 GB in files of 0.5 GB.
@pytest.mark.integration
@pytest.mark.parametrize(
  'width, layers, vocabulary, file',
  [
    (512, 20, 2048, 40e6),
    pytest.param(1024, 26, 32_000, 450e6, marks=pytest.mark.slow),
  ],
)
def test_a_large_model_never_lies_on_the_host_whole(
  width, layers, vocabulary, file, tmp_path
):
  small, large, hidden = tmp_path / 'small', tmp_path / 'large', 4 * width
  small.mkdir(), large.mkdir()
  write_model(small, 'llama')
  config = {
    'model_type': 'llama', 'hidden_size': width, 'intermediate_size': hidden,
    'num_hidden_layers': layers, 'num_attention_heads': 16,
    'vocab_size': vocabulary, 'tie_word_embeddings': False,
  }  # fmt: skip
  (large / 'config.json').write_text(json.dumps(config))
  shutil.copy(EMBEDDED / 'tokenizer.json', large)
  shapes = {
    'model.embed_tokens.weight': (vocabulary, width),
    'lm_head.weight': (vocabulary, width),
    'model.norm.weight': (width,),
  }
  for i in range(layers):
    layer = f'model.layers.{i}'
    for name in 'qkvo':
      shapes[f'{layer}.self_attn.{name}_proj.weight'] = (width, width)
    for name in ('gate', 'up'):
      shapes[f'{layer}.mlp.{name}_proj.weight'] = (hidden, width)
    shapes[f'{layer}.mlp.down_proj.weight'] = (width, hidden)
    for name in ('input_layernorm', 'post_attention_layernorm'):
      shapes[f'{layer}.{name}.weight'] = (width,)
  rng = np.random.default_rng(0)
  names, files, held, weight_map = list(shapes), 0, {}, {}
  for name in names:
    held[name] = rng.random(shapes[name], np.float32)
    if name == names[-1] or sum(v.nbytes for v in held.values()) > file:
      files += 1
      save_file(held, large / f'{files}.safetensors')
      weight_map |= dict.fromkeys(held, f'{files}.safetensors')
      held = {}
  index = large / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': weight_map}))
  sizes = [p.stat().st_size for p in large.glob('*.safetensors')]
  most = 1.25 * max(sizes) + 50e6
  assert len(sizes) > 4 and most < 0.4 * sum(sizes)  # In bfloat16 it is 0.5.
  command = [sys.executable, '-c', MEASURE, str(small), str(large)]
  out = subprocess.run(
    command, check=True, capture_output=True, text=True, cwd=ROOT
  ).stdout
  count, added = map(int, out.split())
  assert count == sum(np.prod(s) for s in shapes.values())
  print(f'adds {added / 1e6:.0f} MB, largest file {max(sizes) / 1e6:.0f} MB')
  assert added < most
