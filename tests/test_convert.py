"""GELU-1L's published form: converted, and equal to TransformerLens."""

import json

import numpy as np
import pytest

from gsae_jax import convert
from gsae_jax.errors import UserError
from gsae_jax.lm.weights import load_language_model
from tests.support.commands import call
from tests.support.locations import ROOT

# PyTorch is imported, here and by the command.
pytestmark = pytest.mark.integration

EMBEDDED = ROOT / 'gsae_jax' / 'lm' / 'embedded'

# The fields of NeelNanda/GELU_1L512W_C4_Code, small; more words than the
# tokenizer of the embedded model.
CONFIG = {
  'd_model': 32, 'd_mlp': 64, 'd_head': 8, 'd_vocab': 2048, 'n_layers': 1,
  'n_heads': 4, 'n_ctx': 64, 'act_fn': 'gelu', 'normalization': 'LN',
  'attn_only': False, 'shortformer_pos': False, 'final_rms': False,
}  # fmt: skip


def run(folder, **changes):
  values = {
    'checkpoint': folder / 'model_final.pth',
    'model_config': folder / 'config.json',
    'tokenizer': EMBEDDED,
    'out': folder / 'out',
  } | changes
  flags = [f'--{k}={v}' for k, v in values.items()]
  return call('convert', *flags, config=None)


@pytest.fixture(scope='session')
def torch():
  return pytest.importorskip('torch', reason='PyTorch is not installed')


def state(torch, lacking=(), **more):
  c = CONFIG
  D, M, K, V, H = (
    c['d_model'], c['d_mlp'], c['d_head'], c['d_vocab'], c['n_heads']
  )  # fmt: skip
  shapes = {
    'embed.W_E': (V, D), 'pos_embed.W_pos': (c['n_ctx'], D),
    'unembed.W_U': (D, V), 'ln_final.w': (D,), 'ln_final.b': (D,),
    'blocks.0.attn.W_O': (H, K, D), 'blocks.0.attn.b_O': (D,),
    'blocks.0.mlp.W_in': (D, M), 'blocks.0.mlp.b_in': (M,),
    'blocks.0.mlp.W_out': (M, D), 'blocks.0.mlp.b_out': (D,),
  }  # fmt: skip
  for name in 'QKV':
    shapes[f'blocks.0.attn.W_{name}'] = (H, D, K)
    shapes[f'blocks.0.attn.b_{name}'] = (H, K)
  for n in (1, 2):
    shapes[f'blocks.0.ln{n}.w'] = shapes[f'blocks.0.ln{n}.b'] = (D,)
  torch.manual_seed(0)
  made = {
    k: 0.3 * torch.randn(s) for k, s in shapes.items() if k not in lacking
  }
  made['blocks.0.attn.mask'] = torch.ones(64, 64, dtype=torch.bool)
  made['blocks.0.attn.IGNORE'] = torch.tensor(-1e5)
  return made | more


@pytest.fixture
def published(tmp_path, torch):
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
  torch.save(state(torch), tmp_path / 'model_final.pth')
  return tmp_path


def open_model(folder):
  return load_language_model(str(folder), revision=None, dtype='float32')


def test_the_folder_is_a_model_of_the_same_numbers(published, torch):
  code, _, err = run(published)
  assert code == 0, err
  lm = open_model(published / 'out')
  want = state(torch)
  np.testing.assert_array_equal(lm.params['W_U'], want['unembed.W_U'])
  np.testing.assert_array_equal(
    lm.params['block_0']['attn']['W_K'][:, 2], want['blocks.0.attn.W_K'][2]
  )
  # An unembedding bias is kept where there is one.
  bias = torch.randn(2048)
  biased = state(torch, **{'unembed.b_U': bias})
  torch.save(biased, published / 'model_final.pth')
  code, _, err = run(published, out=published / 'biased')
  assert code == 0, err
  ids = np.arange(20, dtype=np.int32)[None]
  logits = [
    m.module.apply({'params': m.params}, ids)[0]
    for m in (lm, open_model(published / 'biased'))
  ]
  np.testing.assert_allclose(
    logits[1] - logits[0], bias[None, None].expand(1, 20, -1), atol=1e-5
  )


def test_what_is_no_such_checkpoint_has_its_line(published, torch):
  def refuse(match, **changes):
    code, _, err = run(published, **changes)
    assert code == 1
    assert err.startswith('error: ') and match in err
    assert err.count('\n') == 1
    assert not (published / 'out').exists()

  refuse('has no tokenizer.json', tokenizer=published)
  refuse('is there already', out=published)
  refuse('No such file', checkpoint=published / 'nothing.pth')
  torch.save(
    state(torch, lacking=('embed.W_E',)), published / 'model_final.pth'
  )
  refuse('lacks embed.W_E')
  torch.save(state(torch, more=torch.ones(2)), published / 'model_final.pth')
  refuse('has an unknown more')

  class Evil:
    def __reduce__(self):
      return (print, ('run',))

  torch.save({'x': Evil()}, published / 'model_final.pth')
  refuse('is not a file of tensors alone')
  for change, match in (
    ({'act_fn': 'solu_ln'}, "act_fn is 'solu_ln'; supported is 'gelu'"),
    ({'normalization': 'LNPre'}, "normalization is 'LNPre'"),
  ):
    (published / 'config.json').write_text(json.dumps(CONFIG | change))
    refuse(match)


def test_a_config_without_a_size():
  with pytest.raises(UserError, match='n_ctx is missing'):
    convert.convert_config({k: v for k, v in CONFIG.items() if k != 'n_ctx'})


# HookedTransformer is what 3.x has, and says that 4.0 will not.
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_it_equals_transformer_lens(tmp_path, torch):
  lens = pytest.importorskip(
    'transformer_lens', reason='TransformerLens is not installed'
  )
  if not hasattr(lens, 'HookedTransformer'):
    pytest.skip('this TransformerLens has no HookedTransformer; 3.x has')
  sizes = {k: CONFIG[k] for k in convert._COPIED}
  model = lens.HookedTransformer(
    lens.HookedTransformerConfig(
      **sizes | {'n_layers': 2}, act_fn='gelu', normalization_type='LN', seed=0
    )
  )
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  torch.save(model.state_dict(), tmp_path / 'model_final.pth')
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG | {'n_layers': 2}))
  code, _, err = run(tmp_path)
  assert code == 0, err
  lm = open_model(tmp_path / 'out')
  ids = np.random.default_rng(0).integers(0, 2048, (2, 40)).astype(np.int32)
  sites = tuple(lm.module.config.site_widths())
  logits, taken = lm.module.apply({'params': lm.params}, ids, sites=sites)
  hooks = {
    'attn_pre_linear': 'attn.hook_z',
    'mlp_hidden': 'mlp.hook_post',
    'mlp_out': 'hook_mlp_out',
    'resid_post': 'hook_resid_post',
  }
  with torch.no_grad():
    want, cache = model.run_with_cache(torch.from_numpy(ids).long())
  pairs = [(logits, want)]
  for site in sites:
    kind, layer = site.split('.')
    value = cache[f'blocks.{layer}.{hooks[kind]}']
    pairs.append((taken[site], value.reshape(2, 40, -1)))
  for got, expected in pairs:
    size = expected.abs().max().item()
    np.testing.assert_allclose(got, expected, atol=2e-5 * size)
