"""The configs of the paper's models, and the rows of its tables behind them."""

import collections
import csv
import statistics

import pytest

from experiments import (
  gelu_1l,
  gemma_2_2b,
  gemma_7b,
  gpt2_small,
  pythia_2p8b,
  pythia_70m,
)
from experiments.paper import tables
from gsae_jax import config as config_lib
from gsae_jax.evaluation import pareto
from tests.support.locations import ROOT

SPEC = ROOT.parent / 'shared' / 'spec' / 'tables.csv'

KINDS = ('resid_post', 'mlp_out', 'attn_pre_linear')


def names(layers):
  return tuple(f'{kind}.{layer}' for kind in KINDS for layer in layers)


# Module, context, steps, default sites, all sites, SAEs of the default and all.
CONFIGS = {
  gelu_1l: (128, 300_000, 'mlp_hidden.0', ('mlp_hidden.0',), 10, 10),
  pythia_2p8b: (
    2048, 400_000, 'resid_post.16', names((4, 12, 16, 20, 28)), 12, 108,
  ),
  gemma_7b: (1024, 300_000, 'resid_post.20', names((6, 13, 20, 27)), 19, 165),
  pythia_70m: (128, 50_000, 'resid_post.3', names((3,)), 12, 36),
  gemma_2_2b: (1024, 50_000, 'resid_post.12', names((12,)), 12, 36),
  gpt2_small: (
    128, 50_000, 'resid_post.8', ('resid_post.8', 'mlp_out.8'), 12, 24,
  ),
}  # fmt: skip
OF_TABLES = {gemma_7b: 'Gemma-7B', pythia_2p8b: 'Pythia-2.8B'}


def each_config():
  return pytest.mark.parametrize(
    'module', CONFIGS, ids=lambda m: m.__name__.split('.')[-1]
  )


def parse(module, arg=''):
  return config_lib.parse(module.get_config(arg))


def read(path):
  with path.open(newline='') as f:
    return list(csv.reader(f))


def by_site(model):
  groups = collections.defaultdict(list)
  for r in tables.records(model):
    groups[r['site']].append(r)
  return groups


def test_the_tables_are_the_papers():
  if not SPEC.exists():
    pytest.skip(f'no transcript of the tables at {SPEC}')
  ours = read(ROOT / 'experiments' / 'paper' / 'tables.csv')
  assert ours == read(SPEC)


def test_there_are_283_rows():
  counts = {
    model: collections.Counter(
      (r['site'].split('.')[0], r['architecture'])
      for r in tables.records(model)
    )
    for model in tables.MODELS
  }
  each = [(kind, arm) for kind in KINDS for arm in ('gated', 'relu')]
  gemma = dict(zip(each, (35, 34, 28, 34, 25, 19), strict=True))
  assert counts == {'Gemma-7B': gemma, 'Pythia-2.8B': dict.fromkeys(each, 18)}
  assert sum(sum(c.values()) for c in counts.values()) == 283


@pytest.mark.parametrize('model', tables.MODELS)
def test_loss_recovered_follows_from_the_cross_entropies(model):
  """Equation 5, for each row; four decimals of a loss are what is printed."""
  for r in tables.records(model):
    span = r['ce_zero_ablation'] - r['ce_clean']
    recovered = 1 - (r['ce_spliced'] - r['ce_clean']) / span
    assert abs(recovered - r['loss_recovered']) < 6e-5 + 2e-4 / span, r


def test_what_the_rows_say_of_the_paper():
  rows = {m: tables.records(m) for m in tables.MODELS}
  gemma, pythia = rows['Gemma-7B'], rows['Pythia-2.8B']
  assert sum(r['l0'] is None for r in gemma) == 4
  assert all(r['l0'] > 0 for r in pythia)
  gamma = {
    arm: [r['gamma'] for r in pythia if r['architecture'] == arm]
    for arm in ('gated', 'relu')
  }
  assert all(0.98 <= g <= 1.02 for g in gamma['gated'])
  assert statistics.median(gamma['relu']) == pytest.approx(0.931, abs=0.002)
  assert {r['ce_clean'] for r in gemma} == {2.5426}
  assert {r['ce_clean'] for r in pythia} == {1.9698}


def test_their_frontiers_compare_as_those_of_our_runs():
  ratios = {
    (model, site): pareto.compare(records, 'gated', 'relu')
    for model in tables.MODELS
    for site, records in by_site(model).items()
  }
  known = {k: c.l0_ratio.value for k, c in ratios.items() if c is not None}
  assert known['Gemma-7B', 'resid_post.20'] == pytest.approx(0.40, abs=0.005)
  assert known['Pythia-2.8B', 'resid_post.16'] == pytest.approx(0.33, abs=0.005)
  assert len(known) == 23
  assert [k for k, v in known.items() if v > 1] == [('Gemma-7B', 'mlp_out.27')]
  assert statistics.median(known.values()) == pytest.approx(0.353, abs=0.0005)


@each_config()
def test_a_default_and_everything(module):
  context, steps, default, everything, few, many = CONFIGS[module]
  for arg, sites, count in (('', (default,), few), ('all', everything, many)):
    config = parse(module, arg)
    assert config.sites == sites
    assert len(config.saes) == count
    assert {s.site for s in config.saes} == set(sites)
    assert config.text.context_length == context
    assert config.text.order == 'source' and config.text.prepend_bos is None
    assert (config.train.steps, config.train.batch_size) == (steps, 4096)
    # Half time is a checkpoint that stays: evaluation compares with it.
    kept = config.train.checkpoints_kept_every
    assert kept == steps // 2 and kept % config.train.checkpoint_every == 0


@each_config()
def test_every_choice_is_a_config(module):
  *_, everything, _, _ = CONFIGS[module]
  whole = parse(module, 'all').saes
  seen = []
  for site in everything:
    arms = [parse(module, f'{site},{arm}') for arm in ('gated', 'relu')]
    for config, arm in zip(arms, ('gated', 'relu'), strict=True):
      assert config.sites == (site,)
      assert {s.architecture for s in config.saes} == {arm}
    seen += [*arms[0].saes, *arms[1].saes]
    assert parse(module, f'gated,{site}') == arms[0]
    assert parse(module, f'{site},gated,1:3').saes == arms[0].saes[1:3]
    assert parse(module, f'{site},::-2').saes == parse(module, site).saes[::-2]
  assert tuple(seen) == whole
  two = parse(module, f'{everything[-1]},{everything[0]},0:1')
  assert two.sites == tuple(dict.fromkeys((everything[0], everything[-1])))
  assert two.saes == whole[:1]


@each_config()
@pytest.mark.parametrize(
  'arg, match',
  [
    (
      'resid_post.5',
      "'resid_post.5' is no choice .* the sites .*, all of them",
    ),
    ('gatd', "'gatd' is no choice of this config"),
    ('gated,', "'' is no choice of this config"),
    ('1', "'1' is no choice of this config"),
    ('gated,99:', "'gated,99:' leaves no SAE of this config; the slice is of"),
  ],
)
def test_a_wrong_choice_has_a_line(module, arg, match):
  with pytest.raises(ValueError, match=match) as e:
    module.get_config(arg)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('module', OF_TABLES, ids=OF_TABLES.get)
def test_every_row_is_a_member_in_the_units_of_the_tables(module):
  config = parse(module, 'all')
  wanted = {
    (r['architecture'], r['site'], r['features'], r['l1_coefficient'],
     r['learning_rate'])
    for r in tables.records(OF_TABLES[module])
  }  # fmt: skip
  got = {
    (s.architecture, s.site, s.features, s.l1, s.learning_rate)
    for s in config.saes
  }
  assert got == wanted and len(got) == len(config.saes)
  scales = {(s.architecture, s.loss_scale) for s in config.saes}
  assert scales == {('gated', 'mean'), ('relu', 'mean_over_norm')}
  assert config.train.normalize is None


def test_the_default_of_gemma_row_by_row():
  saes = parse(gemma_7b).saes
  gated, relu = saes[:8], saes[8:]
  assert [s.l1 for s in gated] == [
    1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 8e-4, 9e-4, 1e-3
  ]  # fmt: skip
  assert {(s.features, s.learning_rate) for s in gated} == {(131_072, 3e-4)}
  assert [(s.l1, s.learning_rate) for s in relu] == [
    (1e-5, 7.5e-4), (1.5e-5, 7.5e-4), (2e-5, 7.5e-4), (3e-5, 7.5e-4),
    (3e-5, 1e-3), (4e-5, 7.5e-4), (5e-5, 1e-3), (7e-5, 1e-3), (9e-5, 7.5e-4),
    (1e-4, 7.5e-4), (1.2e-4, 7.5e-4),
  ]  # fmt: skip
  assert {s.features for s in relu} == {196_608}
  assert gated[3].name == 'gated_resid_post.20_131072_0.0005_0.0003'


@each_config()
def test_baselines_have_half_as_many_features_again(module):
  pairs = collections.defaultdict(set)
  for s in parse(module, 'all').saes:
    pairs[s.site, s.architecture].add(s.features)
  for site, arm in list(pairs):
    if arm == 'gated':
      wider = {features * 3 // 2 for features in pairs[site, arm]}
      assert pairs[site, 'relu'] == wider


def test_units_of_the_other_grids():
  gelu = parse(gelu_1l)
  assert {s.loss_scale for s in gelu.saes} == {'mean'}
  assert gelu.train.normalize is None
  grids = [
    [s.l1 for s in gelu.saes if s.architecture == arm]
    for arm in ('gated', 'relu')
  ]
  # The public dictionaries' 3e-4, summed over a batch of 4096, over the width.
  assert grids[0] == grids[1]
  assert grids[0][2] == pytest.approx(3e-4 * 4096 / 2048)
  for module in (pythia_70m, gemma_2_2b, gpt2_small):
    config = parse(module)
    assert {s.loss_scale for s in config.saes} == {'sum'}
    assert config.train.normalize == 'mean_squared_norm'
    assert {s.l1 for s in config.saes} == {
      0.012, 0.015, 0.018, 0.02, 0.024, 0.03, 0.04, 0.06, 0.08
    }  # fmt: skip


@each_config()
def test_a_loader_can_deal_its_rounds(module):
  """What `Loader` asks of a store's sizes, and `Stream` of its buffer's."""
  config = parse(module)
  units = {'chunk': config.store.chunk_rows, 'shard': config.store.shard_rows}
  for unit in units.values():
    assert config.loader.shuffle_rows % unit == 0
    batches = config.loader.shuffle_rows // config.train.batch_size
    assert unit % batches == 0
  assert config.store.buffer_rows == 2**20 <= config.store.tokens
  assert config.store.dtype == 'bfloat16' and config.store.centre
  # 32 KB is the least that reads well; D is 512 at least.
  assert config.store.chunk_rows * 512 * 2 >= 32 * 1024
