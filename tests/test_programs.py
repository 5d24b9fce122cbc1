"""The commands as users run them: what they leave, refuse and survive."""

import json
import shutil
import signal

import numpy as np
import pytest

import gsae_jax
from gsae_jax.activations.store import open_store
from gsae_jax.errors import UserError
from gsae_jax.evaluation import features
from gsae_jax.lm import text
from tests.support.commands import (
  SMOKE,
  files,
  metrics_of,
  refuse,
  run,
  start,
  wait_for,
)
from tests.support.locations import ROOT

pytestmark = pytest.mark.integration


def test_the_four_commands_leave_what_the_contract_says(smoke):
  store, workdir, table, printed = smoke
  opened = open_store(str(store))
  assert opened.rows == 4096
  assert set(opened.sites) == {'mlp_out.0', 'mlp_hidden.0'}
  x = opened.array('mlp_hidden.0/activations')[:].read().result()
  np.testing.assert_allclose(
    (x.astype(np.float64) ** 2).sum(1).mean(),
    opened.sites['mlp_hidden.0'].mean_squared_norm,
  )
  steps = sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir())
  assert steps == [0, 20, 40]
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  metrics = [json.loads(line) for line in lines]
  assert {m['step'] for m in metrics} == set(range(5, 41, 5))
  for step in steps:
    records = json.loads((workdir / f'eval/step_{step}.json').read_text())
    assert [r['member'] for r in records] == [
      'gated_mlp_out.0', 'relu_mlp_out.0', 'gated_mlp_hidden.0', 'relu_mlp_hidden.0'
    ]  # fmt: skip
    assert all(r['num_tokens'] == 1000 and r['step'] == step for r in records)
  assert records[0]['tokens_trained'] == 40 * 128
  assert records[0]['seed'] == 0 and records[0]['l1_coefficient'] == 0.1
  assert 'gated_mlp_hidden.0' in table
  assert printed.strip() == str(workdir / 'report.html')
  assert '<svg' in (workdir / 'report.html').read_text()
  sae = gsae_jax.load(str(workdir), member='relu_mlp_hidden.0')
  assert sae(x[:10]).shape == (10, 512)


def test_four_devices_give_the_numbers_of_one(smoke, tmp_path):
  store, workdir, *_ = smoke
  mesh = ('--config.mesh.data=2', '--config.mesh.model=2')
  run('train', f'--store={store}', f'--workdir={tmp_path}', *mesh, devices=4)
  run('evaluate', f'--workdir={tmp_path}', devices=4)
  read = lambda w: json.loads((w / 'eval/step_40.json').read_text())
  for got, want in zip(read(tmp_path), read(workdir), strict=True):
    for name, value in want.items():
      if isinstance(value, float):
        np.testing.assert_allclose(got[name], value, rtol=2e-3, err_msg=name)
      else:
        assert got[name] == value


@pytest.mark.parametrize(
  'layout',
  ['tensor', pytest.param('fully_sharded', marks=pytest.mark.slow)],
)
def test_a_divided_language_model_gives_the_same_run(layout, smoke, tmp_path):
  store, workdir, *_ = smoke
  flags = f'--config.lm.layout={layout}', '--config.mesh.model=2'
  run('harvest', f'--store={tmp_path}/store', *flags, devices=4)
  there, here = open_store(str(store)), open_store(f'{tmp_path}/store')
  assert here.content_hash == there.content_hash
  for site in here.sites:
    np.testing.assert_allclose(
      here.read(site, 0, here.rows), there.read(site, 0, here.rows), atol=1e-5
    )
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns('eval'))
  run('evaluate', f'--workdir={copy}', *flags, devices=4)
  read = lambda w: json.loads((w / 'eval/step_40.json').read_text())
  for got, want in zip(read(copy), read(workdir), strict=True):
    for name, value in want.items():
      if isinstance(value, float):
        np.testing.assert_allclose(got[name], value, rtol=1e-4, err_msg=name)
      else:
        assert got[name] == value


def test_a_harvest_that_is_killed_continues_as_if_it_were_not(smoke, tmp_path):
  store, *_ = smoke
  records = tmp_path / 'records'
  process = start('harvest', f'--store={tmp_path}', kill=True)
  wait_for(lambda: len(list(records.glob('*.json'))) >= 2, process)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  assert len(list(records.glob('*.json'))) < 8
  run('harvest', f'--store={tmp_path}')
  assert files(tmp_path) == files(store)


# Long enough to be caught in the middle, however busy the machine is.
LONG = ('--config.train.steps=600', '--config.train.checkpoint_every=100')
TWO = 'tests/configs/two_saes.py'


@pytest.fixture(scope='module')
def whole(smoke, tmp_path_factory):
  """The workdir of a longer run that nobody interrupted."""
  workdir = tmp_path_factory.mktemp('whole')
  run('train', f'--store={smoke[0]}', f'--workdir={workdir}', *LONG, config=TWO)
  return workdir


def same_run(ours, theirs):
  """Metrics and weights are equal to the bit."""
  assert metrics_of(ours) == metrics_of(theirs)
  for name in ('gated_mlp_out.0', 'relu_mlp_hidden.0'):
    a, b = (gsae_jax.load(str(w), member=name) for w in (ours, theirs))
    assert a.metadata['step'] == b.metadata['step'] == 600
    for k, v in b.params.items():
      np.testing.assert_array_equal(a.params[k], v)


def test_a_training_that_is_killed_continues_as_if_it_were_not(
  smoke, whole, tmp_path
):
  flags = (f'--store={smoke[0]}', f'--workdir={tmp_path}', *LONG)
  metrics = tmp_path / 'metrics.jsonl'
  process = start('train', *flags, config=TWO, kill=True)
  wait_for(
    lambda: metrics.exists() and '"step": 120,' in metrics.read_text(), process
  )
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  run('train', *flags, config=TWO)
  same_run(tmp_path, whole)


def test_a_preempted_run_exits_42_and_goes_on(smoke, whole, tmp_path):
  flags = (f'--store={smoke[0]}', f'--workdir={tmp_path}', *LONG)
  metrics = tmp_path / 'metrics.jsonl'
  process = start('train', *flags, config=TWO)
  wait_for(lambda: metrics.exists() and metrics.read_text(), process)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 42, err
  saved = max(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
  assert 0 < saved < 600
  run('train', *flags, config=TWO)
  same_run(tmp_path, whole)


def test_a_preempted_harvest_exits_42_and_goes_on(smoke, tmp_path):
  store, *_ = smoke
  flags = (f'--store={tmp_path}',)
  process = start('harvest', *flags)
  wait_for(lambda: (tmp_path / 'manifest.json').exists(), process)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=120)
  assert process.returncode == 42
  run('harvest', *flags)
  assert files(tmp_path) == files(store)


def test_watch_follows_a_run_to_its_last_checkpoint(smoke, tmp_path):
  store, workdir, *_ = smoke  # The watcher is there before the run.
  watcher = start(
    'evaluate', f'--workdir={tmp_path}', '--watch', '--poll_seconds=0.2'
  )
  run('train', f'--store={store}', f'--workdir={tmp_path}')
  out, err = watcher.communicate(timeout=300)
  assert watcher.returncode == 0, err
  for step in (0, 20, 40):
    name = f'eval/step_{step}.json'
    assert (tmp_path / name).read_text() == (workdir / name).read_text()


# Bad input: one line that names what is at fault, exit code 1.


@pytest.mark.parametrize(
  'flag, match',
  [
    ('--config.train.stepz=5', 'stepz'),
    ('--config.train.steps=many', 'train.steps'),
    (
      '--config=tests/configs/wrong_type.py',
      "train.steps must be int, not 'a'",
    ),
    ('--config=tests/configs/raises.py', 'no such dataset: pile'),
    ('--config=tests/configs/not_a_config.py', 'must return an ml_collections'),
    ('--config=experiments/nothing.py', 'nothing.py'),
    ('--config.lm.path=/no/such/folder', 'lm.path: there is no folder'),
    ("--config.sites=('mlp_out.9',)", 'mlp_out.9'),
    ('--config.text.context_length=4096', 'text.context_length: 4096 is more'),
    ('--config.store.tokens=900000000', 'usable tokens'),
    ('--config.text.subset=en', "text.subset: 'en' is for hub ids"),
    (
      '--config.text.path=nothing.txt',
      "text.path: no file matches 'nothing.txt",
    ),
    ('--store=/proc/nothing/store', '--store: cannot write /proc/nothing'),
  ],
)
def test_harvest_refuses(flag, match, tmp_path):
  config = None if flag.startswith('--config=') else SMOKE
  store = [] if flag.startswith('--store') else [f'--store={tmp_path}/store']
  refuse('harvest', *store, flag, match=match, config=config)
  assert not list(tmp_path.rglob('activations'))


def test_help_has_every_flag():
  process = start('train', '--help', config=None)
  out, _ = process.communicate(timeout=300)
  for flag in ('config', 'store', 'workdir', 'allow-config-change', 'process'):
    assert f'--{flag}' in out or f'--[no]{flag}' in out, out
  assert process.returncode == 1  # As absl's help ends.


def test_required_flags_are_asked_for(tmp_path):
  refuse('train', f'--workdir={tmp_path}', match='store')
  refuse('report', '--workdir=/no/where', match='no evaluations in /no/where')
  refuse('report', '--workdirr=/tmp', match='workdirr')
  refuse('evaluate', f'--workdir={tmp_path}', match='no checkpoints at')


def test_training_refuses_stores_and_workdirs_that_do_not_fit(smoke, tmp_path):
  store, workdir, *_ = smoke
  flags = (f'--store={store}', f'--workdir={tmp_path / "run"}')
  before = files(store), files(workdir)
  refuse(
    'train', f'--store={tmp_path}', flags[1], match='no activation store at'
  )
  refuse(
    'train', *flags, '--config.lm.path=/no/model', match='there is no folder'
  )
  refuse('train', *flags, '--config.store.dtype=bfloat16', match='store.dtype=')
  refuse(
    'train',
    *flags,
    '--config.text.context_length=64',
    match='context_length=32',
  )
  refuse('train', *flags, '--config.train.batch_size=8192', match='larger than')
  refuse('train', *flags, '--config.mesh.model=3', match='does not cover')
  refuse(
    'train',
    f'--store={store}',
    f'--workdir={workdir}',
    '--config.train.learning_rate=0.5',
    match='another config (train.learning_rate is 0.003 there and 0.5 here)',
  )
  refuse('train', flags[0], '--workdir=/proc/no/run', match='--workdir: cannot')
  refuse(
    'train',
    flags[0],
    '--workdir=s3://b/run',
    match='checkpoints cannot be on s3',
  )
  assert not (tmp_path / 'run').exists()
  assert (files(store), files(workdir)) == before


def test_a_stream_trains_without_a_store_and_goes_on(smoke, tmp_path):
  flags = (
    '--config.loader.source=stream', '--config.loader.shuffle_rows=1024',
    '--config.store.dtype=bfloat16', '--config.store.centre=True',
    '--config.train.checkpoint_every=10',
  )  # fmt: skip
  run('train', f'--workdir={tmp_path}/whole', *flags)
  shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
  for step in (30, 40):
    shutil.rmtree(tmp_path / f'cut/checkpoints/{step}')
  run('train', f'--workdir={tmp_path}/cut', *flags)
  metrics = metrics_of(tmp_path / 'whole')
  assert metrics == metrics_of(tmp_path / 'cut')
  losses = [m['loss'] for m in metrics if 'loss' in m]
  assert len(losses) == 32 and losses[-1] < losses[3]
  table = run('evaluate', f'--workdir={tmp_path}/whole', *flags)
  assert 'gated_mlp_out.0' in table
  refuse('train', f'--workdir={tmp_path}/x', match='--store is missing')
  refuse(
    'train', f'--workdir={tmp_path}/x', f'--store={smoke[0]}', *flags,
    match="'stream' makes activations anew; leave --store out",
  )  # fmt: skip
  refuse(
    'train', f'--workdir={tmp_path}/whole', *flags,
    '--config.loader.shuffle_rows=2048', match='another config (loader.shuff',
  )  # fmt: skip


def test_a_member_on_top_of_another_runs_baseline(smoke, tmp_path):
  store, workdir, *_ = smoke
  flags = (f'--store={store}', f'--workdir={tmp_path}')
  config = lambda member: f'tests/configs/shift.py:{workdir},{member}'
  for name, match in (
    ('gated_mlp_out.0', "its architecture is 'gated', not 'relu'"),
    ('relu_mlp_hidden.0', "its site is 'mlp_hidden.0', not 'mlp_out.0'"),
    ('nobody', "saes: baseline of member 'shift': member='nobody'"),
  ):
    refuse('train', *flags, config=config(name), match=match)
  assert not (tmp_path / 'metrics.jsonl').exists()
  right = config('relu_mlp_out.0')
  run('train', *flags, config=right)
  table = run('evaluate', f'--workdir={tmp_path}', config=right)
  assert 'shift' in table
  shift, other = json.loads((tmp_path / 'eval/step_40.json').read_text())
  assert shift['architecture'] == 'rescale_shift' and shift['variant'] == ''
  assert other['variant'] == 'encoder=untied, freeze_aux_decoder=False'
  run('report', f'--workdir={tmp_path}')
  page = (tmp_path / 'report.html').read_text()
  assert 'gated, encoder=untied, freeze_aux_decoder=False' in page


def test_a_change_of_config_has_to_be_allowed(smoke, tmp_path):
  store, workdir, *_ = smoke
  shutil.copytree(workdir, tmp_path / 'run')
  flags = (f'--store={store}', f'--workdir={tmp_path}/run')
  longer = '--config.train.steps=45'
  refuse(
    'train', *flags, longer, match='train.steps is 40 there and 45 here)'
  )  # fmt: skip
  refuse(
    'train', *flags, longer, '--allow-config-change=train.step',
    match="no field 'train.step'; did you mean 'train.steps'",
  )  # fmt: skip
  run(
    'train', *flags, longer, '--allow-config-change=train.steps',
    '--allow-config-change=mesh.data',  # Which is free, and no mistake.
  )  # fmt: skip
  assert (tmp_path / 'run/checkpoints/45').exists()


def test_a_store_in_memory_trains_alike(smoke, tmp_path):
  store, workdir, *_ = smoke
  shutil.copytree(workdir, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run/checkpoints/40')
  memory = '--config.loader.source=memory'  # And the run goes on in it.
  run('train', f'--store={store}', f'--workdir={tmp_path}/run', memory)
  assert metrics_of(tmp_path / 'run') == metrics_of(workdir)


def test_training_refuses_another_store_for_the_same_run(smoke, tmp_path):
  _, workdir, *_ = smoke
  run('harvest', f'--store={tmp_path}', '--config.seed=1')
  refuse(
    'train',
    f'--store={tmp_path}',
    f'--workdir={workdir}',
    match='another store',
  )


def test_evaluation_of_other_tokens_is_done_again(smoke, tmp_path):
  _, workdir, *_ = smoke
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  before = (copy / 'eval/step_40.json').stat().st_mtime_ns
  said = 'were evaluated before; to do it again, delete'
  assert said in run('evaluate', f'--workdir={copy}')
  assert (copy / 'eval/step_40.json').stat().st_mtime_ns == before
  flags = f'--workdir={copy}', '--config.eval.tokens=500'
  assert said not in run('evaluate', *flags)
  records = json.loads((copy / 'eval/step_40.json').read_text())
  assert [r['num_tokens'] for r in records] == [500] * 4
  (copy / 'eval/step_40.json').write_text('[{}]')
  refuse(
    'evaluate', f'--workdir={copy}', match='step_40.json is not an evaluat'
  )
  refuse(
    'report', f'--workdir={copy}', match='step_40.json is not an evaluation'
  )


@pytest.mark.slow
def test_what_the_config_asks_for_beyond_is_evaluated(smoke, tmp_path):
  _, workdir, *_ = smoke
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  stale = copy / 'eval/step_20.features'
  assert not stale.exists()
  said = 'were evaluated before'
  for flags in (
    ('--config.eval.stride=2',),
    ('--config.eval.dashboards=all', '--config.eval.special_tokens=both'),
  ):
    assert said not in run('evaluate', f'--workdir={copy}', *flags)
    assert said in run('evaluate', f'--workdir={copy}', *flags)
  of, contexts = features.read(copy, 20, 'gated_mlp_out.0')
  assert of['top_contexts'].shape == of['logit_top_ids'].shape == (64, 10)
  assert of['density'].shape == of['mean_activation'].shape == (64,)
  where = of['top_contexts'], of['top_positions']
  assert contexts['mask'][where][where[0] >= 0].all()
  assert np.all(np.diff(of['logit_top_values']) <= 0)
  assert np.all(np.diff(of['logit_bottom_values']) >= 0)
  with pytest.raises(UserError, match='there are gated_mlp_hidden.0, gated_ml'):
    features.read(copy, 20, 'nobody')
  assert said not in run('evaluate', f'--workdir={copy}')
  assert said in run('evaluate', f'--workdir={copy}')
  # The figures of the first time, and nothing of the others.
  for step in (0, 20, 40):
    name = f'eval/step_{step}.json'
    assert (copy / name).read_text() == (workdir / name).read_text()
  assert not stale.exists()
  with pytest.raises(UserError, match='set eval.dashboards'):
    features.read(copy, 20, 'gated_mlp_out.0')


def test_another_separator_would_hold_out_other_text(smoke, tmp_path):
  # Its documents would not be those that training left alone.
  store, workdir, *_ = smoke
  other = '--config.text.separator=def'
  flags = (f'--store={store}', f'--workdir={tmp_path}')
  refuse('train', *flags, other, match='separator=None')
  flags = (f'--workdir={workdir}', '--config.eval.tokens=500')
  refuse('evaluate', *flags, other, match='text.separator is None there')


@pytest.mark.slow
def test_a_stream_of_documents_goes_through_the_commands(tmp_path):
  documents = text.read_documents('stdlib', None).texts
  short = [{'body': d} for d in documents if len(d) < 3000]
  lines = '\n'.join(map(json.dumps, short))
  (tmp_path / 'lib.jsonl').write_text(lines)
  config = tmp_path / 'config.py'
  config.write_text(
    'from experiments import smoke\n\n'
    'def get_config():\n'
    '  c = smoke.get_config()\n'
    f'  c.text.path = {str(tmp_path / "lib.jsonl")!r}\n'
    "  c.text.field, c.text.order, c.text.window = 'body', 'source', 16\n"
    '  c.text.prepend_bos = None\n'
    '  return c\n'
  )
  store, workdir = f'--store={tmp_path}/store', f'--workdir={tmp_path}/run'
  run('harvest', store, config=config)
  identity = open_store(f'{tmp_path}/store').identity['text']
  assert identity['prepend_bos'] is False and identity['documents'] is None
  assert (identity['field'], identity['window']) == ('body', 16)
  run('train', store, workdir, config=config)
  # Neither order nor window decide what is held out.
  run('evaluate', workdir, '--config.text.order=hash', config=config)
  records = json.loads((tmp_path / 'run/eval/step_40.json').read_text())
  assert all(r['num_tokens'] == 1000 for r in records)
  refuse(
    'train', store, f'--workdir={tmp_path}/other', '--config.text.window=32',
    config=config, match='was harvested with text.window=16, and the config has',
  )  # fmt: skip
  # Found late, and what there was is kept.
  refuse(
    'harvest', f'--store={tmp_path}/more', '--config.store.tokens=200000',
    config=config, match='usable tokens in full contexts of 32, and 200000 are',
  )  # fmt: skip
  assert len(list((tmp_path / 'more' / 'records').glob('*'))) > 10


def test_the_same_model_may_lie_elsewhere(smoke, tmp_path):
  store, workdir, *_ = smoke
  shutil.copytree(ROOT / 'gsae_jax/lm/embedded', tmp_path / 'lm')
  lm = f'--config.lm.path={tmp_path}/lm'
  flags = (f'--store={store}', f'--workdir={tmp_path}/run')
  run(
    'train',
    *flags,
    lm,
    '--config.train.steps=8',
    '--config.train.decay_steps=0',
  )
  run('evaluate', f'--workdir={workdir}', lm)


def test_evaluation_refuses_another_language_model(smoke, tmp_path, stories):
  _, workdir, *_ = smoke
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  (copy / 'eval' / 'step_20.json').unlink()
  refuse(
    'evaluate',
    f'--workdir={copy}',
    f'--config.lm.path={stories[0]}',
    match='trained on other activations (lm.config is',
  )
  assert not (copy / 'eval' / 'step_20.json').exists()
