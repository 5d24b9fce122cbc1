"""The config's door."""

import importlib.util

import ml_collections
import numpy as np
import pytest

from experiments import variants
from experiments.paper import recipe
from gsae_jax import config as config_lib
from gsae_jax.errors import UserError
from tests.support.locations import ROOT

EXPERIMENTS = sorted((ROOT / 'experiments').glob('*.py'))


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def quickstart() -> ml_collections.ConfigDict:
  return load(ROOT / 'experiments' / 'quickstart.py').get_config()


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda p: p.stem)
def test_every_experiment_parses_and_says_what_it_gave(path):
  module = load(path)
  config = config_lib.parse(module.get_config())
  assert len({s.name for s in config.saes}) == len(config.saes)
  for word in ('gsae_jax.train', 'Takes', 'L0'):
    assert word in module.__doc__, word


def refuse(change, match):
  config = quickstart()
  with config.unlocked():
    change(config)
  with pytest.raises(UserError, match=match) as e:
    config_lib.parse(config)
  assert '\n' not in str(e.value)


def put(path, value):
  def change(config):
    *groups, leaf = path.split('.')
    for group in groups:
      config = config[group]
    del config[leaf]
    config[leaf] = value

  return change


def sae(**changes):
  def change(config):
    first, *rest = (dict(s) for s in config.saes)
    config.saes = (first | changes, *rest)

  return change


@pytest.mark.parametrize(
  'change, match',
  [
    (lambda c: c.train.update(stepz=1),
     r"train.stepz is unknown; did you mean 'steps'"),
    (lambda c: c.update(optimizer=1), 'field optimizer is unknown'),
    (lambda c: c.text.__delitem__('held_out'), 'text.held_out is missing'),
    (put('train.steps', '100'), "train.steps must be int, not '100'"),
    (put('train.steps', 10.5), 'train.steps must be int, not 10.5'),
    (put('train.steps', True), 'train.steps must be int, not True'),
    (put('train.learning_rate', -1.0), 'train.learning_rate: -1.0 is too small'),
    (put('train.learning_rate', float('nan')), 'nan is not a number'),
    (put('train.learning_rate', 10**400), 'train.learning_rate: 10+ is too large'),
    (put('store.tokens', -(10**400)), 'store.tokens: -10+ is too small'),
    (put('text.window', np.arange(3)), 'text.window must be int or None, not arr'),
    (lambda c: c.update({'a\nb': 1}), 'field a b is unknown'),
    (put('train.encoder_scale', 0.0), 'train.encoder_scale must be more than 0'),
    (put('train.checkpoints_kept', 0), 'checkpoints_kept: 0 is too small'),
    (put('train.resample_steps', (7000,)), '7000 is not between 0 and train.ste'),
    (sae(seed=-1), 'seed: -1 is too small'),
    (sae(seed=2**32), 'seed: 4294967296 is not below'),
    (put('seed', 2**40), 'field seed: 1099511627776 is not below'),
    (sae(learning_rate=0.0), 'learning_rate must be more than 0'),
    (sae(l1=float('inf')), 'l1: inf is not a number'),
    (sae(name='..'), "'..' must be a word without slashes"),
    (put('train.steps', 0), 'train.steps: 0 is too small; the least is 1'),
    (put('train.resample_steps', 5), 'resample_steps must be a tuple, not 5'),
    (put('train.resample_steps', ('5',)), r"resample_steps\[0\] must be int"),
    (put('train.normalize', 'l2'), "'l2' is not one of 'mean_squared_norm', None"),
    (put('train.loss_scale', 'max'), "'max' is not one of 'sum', 'mean'"),
    (put('train.precision', 'float16'), "'float16' is not one of 'float32', 'bf"),
    (put('train.members', 'both'), "'both' is not one of 'auto', 'stacked', 'lo"),
    (put('train.clip_norm', 0.0), 'train.clip_norm must be more than 0'),
    (put('train.histogram_every', 0), 'histogram_every: 0 is too small'),
    (put('train.checkpoints_kept_every', 5), 'kept_every: train.checkpoints_kept'),
    (sae(encoder='twice'), "encoder: 'twice' is not one of 'tied', 'untied'"),
    (sae(sparsity='l0'), "sparsity: 'l0' is not one of 'l1', 'decoder_norm_l1'"),
    (sae(loss_scale='max'), "loss_scale: 'max' is not one of 'sum', 'mean'"),
    (sae(architecture='jumprelu'),
     "architecture: 'jumprelu' is not trained .*; train 'gated', and make it"),
    (sae(architecture='relu', encoder='untied'),
     "encoder: 'untied' is not for architecture 'relu'"),
    (sae(architecture='relu', freeze_aux_decoder=False),
     "freeze_aux_decoder: False is not for architecture 'relu'"),
    (sae(architecture='relu', centre_stop_gradient=True),
     "centre_stop_gradient: True is not for architecture 'relu'"),
    (sae(architecture='rescale_shift', l1=0.0), 'say which SAE it starts from'),
    (sae(baseline='run'), r"baseline: .* 'gated'; leave it out"),
    (sae(baseline_member='a'), r"baseline: .* 'gated'; leave it out"),
    (sae(architecture='rescale_shift', baseline='run'), 'has no sparsity term'),
    (sae(architecture='rescale_shift', baseline='run', l1=0.0,
         sparsity='decoder_norm_l1'), "is not for architecture 'rescale_shift'"),
    (lambda c: (c.mesh.update(sae=2), c.train.update(members='looped')),
     "train.members: 'looped' members cannot be spread over mesh.sae, 2"),
    (put('train.writers', ('csv',)), "'csv' is not one of 'tensorboard', 'wandb'"),
    (put('text.held_out', 1.5), 'text.held_out: 1.5 is not between 0 and 1'),
    (put('text.packing', 'x'), "text.packing: 'x' is not one of"),
    (put('text.order', 'x'), "text.order: 'x' is not one of 'hash', 'source'"),
    (put('text.window', 0), 'text.window: 0 is too small; the least is 1'),
    (put('text.separator', ''), "text.separator: '' divides nothing; set it to N"),
    (put('text.prepend_bos', 1), 'text.prepend_bos must be bool or None, not 1'),
    (put('text.special_tokens', 'x'), "text.special_tokens: 'x' is not one of"),
    (put('lm.dtype', 'int8'), "lm.dtype: 'int8' is not one of"),
    (put('lm', 'gpt2'), "lm must be a group of fields, not 'gpt2'"),
    (put('store.dtype', 'float16'), "'float16' is not one of"),
    (put('store.shard_rows', 1000), '1000 is not a multiple of store.chunk_rows'),
    (put('store.shard_rows', 4096 * 3), 'buffer_rows: 131072 is not a multiple'),
    (put('store.buffer_rows', 0), 'store.buffer_rows: 0 is too small'),
    (put('store.centre', True), 'store.centre: it saves bits of bfloat16'),
    (put('loader.source', 'disk'), "'disk' is not one of 'store', 'memory'"),
    (put('loader.unit', 'row'), "'row' is not one of 'chunk', 'shard'"),
    (put('loader.shuffle_rows', 0), 'loader.shuffle_rows: 0 is too small'),
    (put('eval.parallel', 'xmap'), "'xmap' is not one of 'pmap', 'mesh'"),
    (put('sites', ()), 'field sites is empty'),
    (put('saes', ()), 'field saes is empty'),
    (lambda c: c.update(saes=c.saes + c.saes[:1]), 'names .* twice'),
    (sae(site='mlp_out.7'), "of site 'mlp_out.7', and sites has only"),
    (sae(architecture='topk'), "'topk' is not one of 'gated', 'relu'"),
    (sae(feature=3), r'saes\[0\].feature is unknown'),
    (sae(name='a/b'), "'a/b' must be a word without slashes"),
    (sae(l1=-1.0), 'l1: -1.0 is too small'),
    (lambda c: c.train.update(resample_steps=(5,), resample_rows=1),
     'train.resample_rows: 1 is less than a batch'),
  ],
)  # fmt: skip
def test_mistakes_have_a_line(change, match):
  refuse(change, match)


def test_none_can_be_said_on_a_command_line():
  config = quickstart()
  config.train.normalize = 'None'
  assert config_lib.parse(config).train.normalize is None


@pytest.mark.parametrize('value', [None, {'seed': 0}, 3])
def test_get_config_must_return_a_config(value):
  with pytest.raises(UserError, match='must return an ml_collections.ConfigDi'):
    config_lib.parse(value)


def test_integers_serve_where_floats_are_asked_for():
  config = quickstart()
  config.train.learning_rate = 1
  assert config_lib.parse(config).train.learning_rate == 1.0


def test_identity_leaves_out_what_may_change_between_starts():
  a, b = quickstart(), quickstart()
  b.eval.tokens, b.mesh.model, b.train.log_every = 10, 2, 7
  b.train.checkpoint_every = 3
  same = config_lib.parse(a).identity()
  assert config_lib.parse(b).identity() == same
  b.loader.source = 'memory'  # Which gives the same batches.
  assert config_lib.parse(b).identity() == same
  b.loader.shuffle_rows //= 2
  assert config_lib.parse(b).identity() != same
  b.loader.shuffle_rows *= 2
  b.loader.source = 'stream'
  assert config_lib.parse(b).identity() != same
  b.loader.source = 'store'
  b.train.learning_rate = 1.0
  assert config_lib.parse(b).identity() != same


@pytest.mark.parametrize('family', ['gelu', 'pythia', 'gemma'])
def test_the_papers_recipe_is_a_config(family):
  raw = recipe.paper(quickstart(), family)
  raw.store.tokens = 2**21
  raw.saes = tuple(
    recipe.member(
      arm, family, name=arm, site='mlp_out.0', features=features, l1=1e-3
    )
    for arm, features in (('gated', 512), ('relu', 768))
  )
  config = config_lib.parse(raw)
  train = config.train
  assert (train.batch_size, train.warmup_steps, train.loss_scale) == (
    4096, 1000, 'mean'
  )  # fmt: skip
  assert train.steps == {'pythia': 400_000}.get(family, 300_000)
  assert train.normalize is None and train.clip_norm is None
  gated, relu = config.saes
  assert gated.learning_rate == 3e-4 and gated.loss_scale == 'mean'
  plain = family == 'gelu'
  assert relu.learning_rate == (3e-4 if plain else 1e-3)
  assert relu.loss_scale == ('mean' if plain else 'mean_over_norm')


@pytest.mark.parametrize(
  'arg', ['', 'stories260k', 'baselines=here', 'stories260k,baselines=here']
)
def test_the_variants_are_a_config(arg):
  config = config_lib.parse(variants.get_config(arg))
  if 'baselines' in arg:
    assert {s.architecture for s in config.saes} == {'rescale_shift'}
    assert {s.baseline for s in config.saes} == {'here'}
  else:
    assert len(config.saes) == 30
    assert len({s.features for s in config.saes}) == 2
  with pytest.raises(ValueError, match="no variant 'x'"):
    variants.get_config('x')
