"""The paper's study: members of any config, verdicts, and the whole page."""

import csv
import io
import json
import re

import numpy as np
import pytest

from experiments import quickstart, sweep_l1
from experiments.paper import all as all_lib
from experiments.paper import (
  arms,
  beside,
  claims,
  embedded,
  results,
  runs,
  stories260k,
  verdicts,
  written,
)
from experiments.paper import pareto as pareto_lib
from experiments.paper import study as study_lib
from gsae_jax import config as config_lib
from gsae_jax.errors import UserError
from gsae_jax.evaluation import metrics, pareto, records
from gsae_jax.evaluation.frontiers import Estimate
from tests.support.commands import refuse, run

SITE = 'mlp_out.0'


def study(config, workdir, **changes):
  values = {
    'raw': config, 'workdir': workdir, 'store': str(workdir / 'store'),
    'harvested': False, 'coefficients': 8, 'seeds': 3,
    'ablation_site': config.sites[0], 'ablation_coefficients': 4,
  }  # fmt: skip
  return study_lib.Study(**values | changes)


# Members.


@pytest.mark.parametrize('module', [embedded, stories260k])
def test_members_of_the_studies(module, tmp_path):
  c = module.get_config()
  s = study(c, tmp_path)
  members = s.members
  assert {p: len(m) for p, m in members.items()} == {
    'arms': 2 * 2 * 8 * 3, 'ablations': 4 * 4 * 3, 'shift': 4 * 3
  }  # fmt: skip
  for part in study_lib.PARTS:
    config = config_lib.parse(s.config(part))  # Names are unique and fit.
    assert config.sites == c.sites
    assert {m.seed for m in config.saes} == {0, 1, 2}
  for site, (gated, relu) in s.pairs.items():
    assert relu.features * 2 == gated.features * 3
    l1 = sorted({
      m['l1']
      for m in members['arms']
      if m['site'] == site and m['architecture'] == 'gated'
    })  # fmt: skip
    assert (l1[0], l1[-1], len(l1)) == (*gated.ends, 8)
    np.testing.assert_allclose(np.diff(np.log(l1)), np.log(l1[1] / l1[0]), 5e-3)
  gated, relu = s.pairs[c.sites[0]]
  by_name = {m['name']: m for m in members['ablations']}
  assert {m['site'] for m in by_name.values()} == {c.sites[0]}
  assert {m['features'] for m in by_name.values()} == {gated.features}
  untied = by_name[f'untied_{c.sites[0]}_l{gated.ends[0]:g}_s2']
  assert (untied['encoder'], untied['learning_rate']) == ('untied', 3e-3)
  unfrozen = by_name[f'unfrozen_{c.sites[0]}_l{gated.ends[1]:g}_s0']
  assert unfrozen['freeze_aux_decoder'] is False
  shift = members['shift'][0]
  below = by_name[shift['baseline_member']]
  assert (below['architecture'], below['l1']) == ('relu', relu.ends[0])
  assert (shift['seed'], shift['l1']) == (below['seed'], 0.0)
  assert shift['baseline'] == str(tmp_path / 'ablations')


def parsed(*saes):
  c = quickstart.get_config()
  c.saes = tuple(
    {'name': f'm{i}', 'site': SITE, 'features': 64} | s
    for i, s in enumerate(saes)
  )
  return config_lib.parse(c).saes


def test_arms_pass_over_variants_and_follow_the_most():
  gated = {'architecture': 'gated'}
  relu = {'architecture': 'relu', 'features': 96}
  saes = parsed(
    gated | {'l1': 0.1, 'learning_rate': 1e-3},
    gated | {'l1': 0.2, 'learning_rate': 2e-3},
    gated | {'l1': 0.4, 'learning_rate': 2e-3},
    gated | {'l1': 9.0, 'features': 32},
    gated | {'l1': 8.0, 'encoder': 'untied'},
    relu | {'l1': 0.1, 'loss_scale': 'mean'},
    relu | {'l1': 0.3, 'loss_scale': 'mean'},
  )
  (pair,) = arms.find(saes).values()
  assert pair == (
    arms.Arm('gated', SITE, 64, 2e-3, None, (0.1, 0.4)),
    arms.Arm('relu', SITE, 96, None, 'mean', (0.1, 0.3)),
  )
  assert pair[0].coefficients(3) == [0.1, 0.2, 0.4]
  assert 'learning_rate' not in pair[1].member('relu', 0.1, 0)
  assert arms.some([1, 2, 3, 4, 5, 6, 7, 8], 4) == [1, 3, 6, 8]
  assert arms.some([1, 2], 4) == [1, 2]


def test_configs_without_two_arms_are_refused():
  with pytest.raises(UserError, match='no site has both arms'):
    arms.find(config_lib.parse(sweep_l1.get_config()).saes)
  one = parsed(
    {'architecture': 'gated', 'l1': 0.1},
    {'architecture': 'gated', 'l1': 0.1},
    {'architecture': 'relu', 'l1': 0.1},
  )
  with pytest.raises(UserError, match=r"'gated' at mlp_out.0 .* 0.1 to 0.1"):
    arms.find(one)


def test_a_written_config_reads_back(tmp_path):
  c = study(embedded.get_config(), tmp_path).config('shift')
  path = tmp_path / 'config.json'
  path.write_text(written.text(c))
  back = written.get_config(str(path))
  assert config_lib.parse(back) == config_lib.parse(c)
  back.lm.revision = 'x'  # As --config.lm.revision=x would.
  path.write_text('{')
  with pytest.raises(ValueError, match='is not a written config'):
    written.get_config(str(path))


def test_another_config_in_the_same_workdir_is_refused(tmp_path, monkeypatch):
  ran = []
  monkeypatch.setattr(
    study_lib.Study, 'command', lambda self, *given: ran.append(given[0])
  )
  c = embedded.get_config()
  study(c, tmp_path).run('arms')
  wanted = ['gsae_jax.harvest', 'gsae_jax.train', 'gsae_jax.evaluate']
  assert ran == wanted
  c.train.batch_size = 64
  study(c, tmp_path).run('arms')  # Nothing was computed with the other one.
  (tmp_path / 'arms' / 'checkpoints').mkdir()
  c.train.batch_size = 128
  with pytest.raises(
    UserError, match='batch_size=64, and here it is 128, and 1 more differ'
  ):
    study(c, tmp_path).run('arms')
  c.train.batch_size = 64
  study(c, tmp_path).run('arms')
  with pytest.raises(UserError, match='begun with other SAEs'):
    study(c, tmp_path, seeds=2).run('arms')
  c.eval.tokens = 5  # Evaluation may change.
  study(c, tmp_path).run('arms')
  assert ran == wanted * 4


# Claims, on records whose truth is known.


def sae(name, l0, recovered, *, gamma=1.0, l1=0.1, seed=0, alive=1.0, site=SITE,
        rng=None, documents=60, **changes):  # fmt: skip
  full = np.full(documents, 100.0)
  noise = lambda scale: 1 + rng.normal(0, scale, documents)
  sums = dict.fromkeys((*metrics.OF_SITE, *metrics.OF_SAE), full) | {
    'ce_clean': 3.0 * full,
    'ce_zero': 5.0 * full,
    'l0': l0 * full * noise(0.05),
    'ce_spliced': full * (3.0 + 2.0 * (1 - recovered) * noise(0.05)),
    'x_hat_squared': gamma * full * noise(0.01),
  }
  fired = np.arange(100) < 100 * alive
  about = {
    'member': f'{name}_{site}_l{l1:g}_s{seed}', 'site': site, 'architecture':
    name if name in ('relu', 'rescale_shift') else 'gated', 'variant': '',
    'features': 64, 'l1_coefficient': l1, 'seed': seed, 'step': 10,
    'tokens_trained': 1000, 'evaluation': {},
  }  # fmt: skip
  return about | metrics.record(sums, fired) | changes, sums


def frontier(name, factor, rng, *, gamma=1.0, gammas=None, top=0.9, **changes):
  levels = np.linspace(0.6, top, 4)
  gammas = gammas or (gamma,) * 4
  return [
    sae(name, factor * 10 * 2 ** (10 * (v - 0.6)), v, gamma=g, l1=0.4 / 2**i,
        seed=seed, rng=rng, **changes)
    for seed in (0, 1)
    for i, (v, g) in enumerate(zip(levels, gammas, strict=True))
  ]  # fmt: skip


def as_run(found):
  ids = np.arange(len(found[0][1]['tokens']), dtype=np.uint64)
  sums = {r['member']: s for r, s in found}
  step = {10: [r for r, _ in found]}
  return runs.Run(step, {10: records.Documents(ids, sums)}, {})


def pursuits(arm, l0, own, factor, rng, seed, **changes):
  name = f'{arm}{l0}'
  about = {
    'dictionary': f'{name}_s{seed}', 'architecture': arm, 'seed': seed,
  } | changes  # fmt: skip
  out = [sae(name, l0, own, rng=rng, method='encoder', k=None, **about)]
  for k in (5, 10, 20, 40, 80):
    level = 0.6 + 0.1 * np.log2(k / factor / 10)
    of = {'rng': rng, 'method': 'gradient', 'k': k} | about
    out.append(sae(f'{name}.gradient.{k}', k, level, **of))
  return out


TOY = {'relu': {'error_above': 0.2}, 'jumprelu': {'error_above': 0.0}}
SAME = {'gates': 0, 'entries': 1_000_000, 'largest': 1e-7, 'scale': 1.0}


def findings(**changes):
  """Every claim holds, but for what is changed."""
  v = {
    'gated': 0.4, 'top': 0.9, 'gamma': 1.0, 'gammas': (0.8, 0.85, 0.9, 0.95),
    'alive': 1.0, 'unfrozen': 0.55, 'no_r_mag': 0.44, 'untied': 0.41,
    'narrow': 1.1, 'shift': 0.8, 'shift_gamma': 1.0, 'ito': 0.7, 'far': 0.8,
    'gated_own': 0.72, 'relu_own': 0.5, 'jumprelu': {SITE: SAME}, 'toy': TOY,
    'documents': 60,
  } | changes  # fmt: skip
  rng = np.random.default_rng(0)
  own = {'documents': v['documents']}
  arms_found = [
    *frontier('gated', v['gated'], rng, gamma=v['gamma'], top=v['top'],
              alive=v['alive'], **own),
    *frontier('relu', 1.0, rng, gammas=v['gammas'], top=0.88, **own),
  ]  # fmt: skip
  others = [
    s
    for name in ('unfrozen', 'no_r_mag', 'untied')
    for s in frontier(name, v[name], rng, **own)
  ]
  others += frontier('relu_equal_width', v['narrow'], rng, **own)
  others += frontier(
    'rescale_shift', v['shift'], rng, gamma=v['shift_gamma'], **own
  )
  ito = []
  for arm, factor in (('gated', v['ito']), ('relu', 1.0)):
    for l0, better in ((15, 1.0), (60, v['far'])):
      recovered = v[f'{arm}_own'] + 0.1 * np.log2(l0 / 20)
      for seed in (0, 1):
        ito += pursuits(arm, l0, recovered, factor * better, rng, seed, **own)
  return claims.Findings(
    as_run(arms_found),
    as_run(arms_found + others),
    as_run(ito),
    SITE,
    {SITE: (128, 512, 768)},
    v['jumprelu'],
    v['toy'],
  )


def verdict(start, **changes):
  found = claims.judged(findings(**changes))
  (claim,) = [c for c in found if c.claim.startswith(start)]
  return claim.verdict


def test_every_claim_can_hold():
  found = claims.judged(findings())
  assert len(found) == 26
  wrong = {c.claim: c.measured for c in found if c.verdict != verdicts.HOLDS}
  assert list(wrong) == [
    'Gated features are as interpretable as the baseline’s'
  ], wrong
  assert found[-1].verdict == verdicts.UNTESTED
  shown = claims.text(found)
  assert shown.count('\n') == 2 * 26 - 1 and '✓ holds' in shown


@pytest.mark.parametrize(
  'start, changes, wanted',
  [
    ('Half the firing', {'gated': 0.6}, verdicts.FAILS),
    ('At most 0.7', {'gated': 0.6}, verdicts.HOLDS),
    ('At most 0.7', {'gated': 0.8}, verdicts.FAILS),
    ('Fewer', {'gated': 0.8}, verdicts.HOLDS),
    ('Fewer', {'gated': 1.2}, verdicts.FAILS),
    ('Fewer', {'gated': 1.0}, verdicts.UNDECIDED),
    ('A Pareto', {'gated': 1.2}, verdicts.FAILS),
    ('A Pareto', {'gated': 1.0}, verdicts.UNDECIDED),
    ('The most loss', {'top': 0.8}, verdicts.FAILS),
    ('Gated solves', {'gamma': 0.9}, verdicts.FAILS),
    ('Gated solves', {'gamma': 1.0199}, verdicts.UNDECIDED),
    ('Gated solves', {'gammas': (0.99,) * 4}, verdicts.UNDECIDED),
    ('The baseline', {'gammas': (0.9, 0.85, 0.8, 0.7)}, verdicts.FAILS),
    ('The baseline', {'gammas': (1.1, 1.1, 1.1, 1.2)}, verdicts.FAILS),
    ('Few Gated', {'alive': 0.3}, verdicts.FAILS),
    ('Freezing', {'unfrozen': 0.3}, verdicts.FAILS),
    ('It matters', {'untied': 0.7}, verdicts.FAILS),
    ('Without r_mag', {'no_r_mag': 0.35}, verdicts.FAILS),
    ('Without r_mag', {'no_r_mag': 0.4}, verdicts.UNDECIDED),
    ('Untying', {'untied': 0.3}, verdicts.FAILS),
    ('Rescale', {'shift_gamma': 0.9}, verdicts.FAILS),
    ('It improves', {'shift': 1.4}, verdicts.FAILS),
    ('Gated stays', {'shift': 0.3}, verdicts.FAILS),
    ('Gated dictionaries', {'ito': 1.5}, verdicts.FAILS),
    ('Pursuit gains', {'gated_own': 0.4}, verdicts.FAILS),
    ('Dictionaries trained at larger L0 are better for pursuit (Gated)',
     {'far': 1.5}, verdicts.FAILS),
    ('A tied', {'jumprelu': {SITE: SAME | {'gates': 11}}}, verdicts.FAILS),
    ('A tied', {'jumprelu': {SITE: SAME | {'largest': 1e-3}}}, verdicts.FAILS),
    ('A tied', {'jumprelu': {}}, verdicts.UNTESTED),
    ('Toy', {'toy': TOY | {'jumprelu': {'error_above': 0.1}}}, verdicts.FAILS),
  ],
)  # fmt: skip
def test_both_sides_of_every_rule(start, changes, wanted):
  assert verdict(start, **changes) == wanted


def test_one_seed_decides_no_comparison():
  """Its interval, of documents alone, would leave training out."""
  rng = np.random.default_rng(0)
  both = frontier('gated', 0.4, rng) + frontier('relu', 1.0, rng)
  for seeds, decides in (((0, 1), True), ((0,), False)):
    run = as_run([(r, s) for r, s in both if r['seed'] in seeds])
    found = pareto.compare(run.last, 'gated', 'relu', run.resampled)
    assert found.seeds == len(seeds) and found.l0_ratio.interval
    kept = claims._decisive(found)
    assert (kept.interval is not None) == decides
    assert kept.value == found.l0_ratio.value
    wanted = verdicts.HOLDS if decides else verdicts.UNDECIDED
    assert verdicts.below(kept, 0.5) == wanted


def test_one_document_decides_nothing_that_has_an_interval():
  found = claims.judged(findings(documents=1))
  counted = ('Few Gated', 'Training', 'The comparison', 'Gated has', 'Inference',
             'A tied', 'Toy', 'Gated features')  # fmt: skip
  for c in found:
    if not c.claim.startswith(counted):
      assert c.verdict == verdicts.UNDECIDED, c


def test_rules_on_intervals():
  sure, wide, bare = (Estimate(0.5, i) for i in ([0.4, 0.5], [0.4, 0.7], None))
  assert verdicts.below(sure, 0.5) == verdicts.HOLDS
  assert verdicts.below(wide, 0.5) == verdicts.UNDECIDED
  assert verdicts.below(sure, 0.3) == verdicts.FAILS
  assert verdicts.above(sure, 0.4) == verdicts.HOLDS
  assert verdicts.above(sure, 0.45) == verdicts.UNDECIDED
  assert verdicts.above(sure, 0.6) == verdicts.FAILS
  for rule in (verdicts.below, verdicts.above):
    assert {rule(bare, 0.1), rule(None, 0.1)} == {verdicts.UNDECIDED}
  assert verdicts.within([sure, wide], 0.4, 0.7) == verdicts.HOLDS
  assert verdicts.within([sure, wide], 0.4, 0.6) == verdicts.UNDECIDED
  assert verdicts.within([sure, wide], 0.8, 0.9) == verdicts.FAILS
  assert verdicts.within([sure, bare], 0.4, 0.7) == verdicts.UNDECIDED
  assert verdicts.within([], 0.0, 1.0) == verdicts.UNDECIDED


def test_the_papers_own_rows_beside_ours():
  rows = beside.rows()
  assert rows.ratio_text().endswith(
    'median 0.35 of 23 sites, below 1 at 22, at or below 0.5 at 20'
  ), rows.ratio_text()
  assert '54 of' not in rows.gamma_text()  # Both models, not Pythia's alone.
  (first, *_) = pareto_lib.overlaid('Gemma-7B:resid_post.20', ['resid_post.2'])
  assert first['seed'] == 0 and 'of the paper' in first['variant']
  for wrong in ('Gemma-7B:mlp_hidden.1', 'GPT:resid_post.20', 'Gemma-7B'):
    with pytest.raises(UserError, match='--overlay: no table'):
      pareto_lib.overlaid(wrong, ['resid_post.2'])
  with pytest.raises(UserError, match='and here are mlp_out.2'):
    pareto_lib.overlaid('Gemma-7B:resid_post.20', ['mlp_out.2'])


# Pages.


def test_the_page_has_every_figure_and_the_claims_first(tmp_path):
  f = findings()
  rates = {r['member']: 1e-3 for r in f.everything.last}
  f.everything.rates.update(rates)
  s = study(embedded.get_config(), tmp_path)
  body = all_lib.body(s, f)
  headings = re.findall('<h2>(.*?)</h2>', body)
  for number in ('1, 5, 12, 13', '6, 14', '8', '9', '10, 11', '15'):
    assert any(re.search(rf'Figures? {number}\)', h) for h in headings), number
  assert headings[0] == 'The paper’s claims' and 'Tables 1 to 8' in headings[-1]
  assert 'nan' not in body.lower() and '<script' not in body
  assert body.count('<svg') >= 10 and '<polygon' in body
  written_claims = json.loads((tmp_path / 'claims.json').read_text())
  assert written_claims[0]['verdict'] == 'holds' and len(written_claims) == 26


def test_results_csv_parses_back_to_the_records():
  f = findings()
  run = f.everything
  run.rates.update({r['member']: 1e-3 for r in run.last})
  rows = list(csv.DictReader(io.StringIO(results.csv_text(run))))
  assert len(rows) == len(run.last)
  for row, r in zip(rows, run.last, strict=True):
    assert row['member'] == r['member'] and float(row['learning_rate']) == 1e-3
    for name in ('l0', 'loss_recovered', 'gamma', 'alive_fraction'):
      assert float(row[name]) == r[name]
    assert [float(row['l0_low']), float(row['l0_high'])] == r['intervals']['l0']


def test_runs_on_different_documents_do_not_join():
  a, b = findings().arms, findings(documents=30).arms
  with pytest.raises(UserError, match='different documents'):
    runs.joined([a, b])


# Everything, once.


@pytest.mark.integration
def test_wrong_flags_have_a_line(tmp_path):
  flags = ('--config=experiments/paper/embedded.py', f'--workdir={tmp_path}')
  refuse(
    'study', *flags, '--ablation_site=x', config=None, package='experiments.paper',
    match="'x' has not both arms",
  )  # fmt: skip


TINY = (
  '--config=experiments/paper/embedded.py', '--coefficients=2', '--seeds=2',
  '--ablation_coefficients=2', '--config.text.context_length=32',
  '--config.store.tokens=8192', '--config.store.shard_rows=1024',
  '--config.store.chunk_rows=16', '--config.store.buffer_rows=2048',
  '--config.store.batch_contexts=8', '--config.train.steps=60',
  '--config.train.checkpoint_every=30', '--config.train.batch_size=128',
  '--config.loader.shuffle_rows=1024', '--config.eval.tokens=2000',
  '--config.eval.batch_size=8', '--config.eval.dashboards=none',
)  # fmt: skip


@pytest.mark.slow
def test_the_whole_study_and_nothing_twice(tmp_path):
  command = dict(config=None, package='experiments.paper')
  out = run('all', *TINY, f'--workdir={tmp_path}', **command)
  assert out.count('+ ') == 1 + 3 * 2 + 1  # Harvest, three runs, the pursuits.
  page = (tmp_path / 'index.html').read_text()
  assert page.count('<svg') > 10 and 'The paper’s claims' in page
  found = json.loads((tmp_path / 'claims.json').read_text())
  assert {c['verdict'] for c in found} <= set(claims._MARKS)
  rows = (tmp_path / 'results.csv').read_text().splitlines()
  assert len(rows) == 1 + 2 * 2 * 2 * 2 + 4 * 2 * 2 + 2 * 2
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.json')}
  again = run('all', *TINY, f'--workdir={tmp_path}', **command)
  assert '+ ' not in again
  after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.json')}
  assert {p for p in after if after[p] != before[p]} == {
    tmp_path / 'claims.json'
  }
