"""What a run's name stands for."""

import json
import os
import subprocess
import sys

import pytest
from etils import epath

from gsae_jax.errors import UserError
from launch import identity
from launch.submission import check_hosts, date_of_packages
from tests.support.fake_gcs import FakeGCS
from tests.support.locations import ROOT
from tests.support.submissions import CODE, submission

CONFIG = {
  'seed': 0,
  'train': {'steps': 10, 'writers': []},
  'saes': [
    {'name': 'a', 'features': 6, 'l1': 0.1},
    {'name': 'b', 'features': 6, 'l1': 0.2},
  ],
}


def recorded(tmp_path, **changes):
  run = submission(tmp_path / 'name', config=CONFIG, **changes)
  run.record('tpu', ('trainer', 'evaluator'), {'date': 'then', 'requests': {}})
  return run


def test_a_run_is_all_in_its_folder(tmp_path):
  run = recorded(tmp_path).run
  assert json.loads((run / 'config.json').read_text()) == CONFIG
  code = run / 'code'
  about = json.loads((code / f'{CODE.id}.json').read_text())
  assert about['commit'] == 'c0ffee' and about['dirty'] is True
  assert (code / f'{CODE.id}.tar.gz').read_bytes() == b'archive'
  assert (code / f'{CODE.id}.diff').read_bytes() == b'diff'
  launch = json.loads((run / 'launch.json').read_text())
  assert launch['target'] == 'tpu' and launch['code'] == CODE.id
  told = identity.told(run)
  assert [told[r]['state'] for r in identity.ROLES] == ['submitted'] * 2


def test_a_rerun_goes_on_with_the_packages_it_had(tmp_path):
  first = recorded(tmp_path)
  identity.tell(first.run, 'evaluator', 'failed', 'follow', 'why')
  assert date_of_packages(first.run) == 'then'
  first.record('tpu', ('trainer',), {'date': 'then', 'requests': {}})
  assert [*identity.told(first.run)] == ['trainer']
  assert date_of_packages(epath.Path(tmp_path / 'other')) != 'then'


def test_another_config_under_a_name_is_refused(tmp_path):
  first = recorded(tmp_path)
  other = json.loads(json.dumps(CONFIG))
  other['train']['steps'] = 20
  other['saes'][1]['l1'] = 0.3
  other['lm'] = {'path': 'x'}
  with pytest.raises(UserError) as refusal:
    identity.check_config(first.run, other)
  assert str(refusal.value) == (
    "--run: name has another config (lm.path is (missing) there and 'x' here; "
    'saes.b.l1 is 0.2 there and 0.3 here; train.steps is 10 there and 20 here); '
    'give this one another name, or allow the change by '
    '--allow-config-change=lm.path'
  )
  with pytest.raises(
    UserError, match="no field 'train.step'; did you mean 'tra"
  ):
    identity.check_config(first.run, other, ('lm', 'saes.b', 'train.step'))
  with pytest.raises(UserError, match='change=train.steps'):
    identity.check_config(first.run, other, ('lm', 'saes.b'))
  identity.check_config(first.run, other, ('lm', 'saes.b', 'train.steps'))
  identity.check_config(tmp_path / 'new', other, ('train.steps',))
  with pytest.raises(UserError, match="no field 'steps'"):
    identity.check_config(tmp_path / 'new', other, ('steps',))


def test_members_may_be_left_out_and_keep_their_shape(tmp_path):
  first = recorded(tmp_path)
  wider = json.loads(json.dumps(CONFIG))
  wider['saes'][0]['features'] = 7
  with pytest.raises(
    UserError, match='a.features is 6 .* cannot change within'
  ):
    identity.check_config(first.run, wider, ('saes',))
  fewer = CONFIG | {'saes': CONFIG['saes'][1:]}
  with pytest.raises(
    UserError, match=r'saes.a.features is 6 .*\(missing\) here'
  ):
    identity.check_config(first.run, fewer)
  with pytest.raises(UserError, match=r'change=saes\.a$'):
    identity.check_config(first.run, fewer, ('saes.a.features', 'saes.a.l1'))
  identity.check_config(first.run, fewer, ('saes.a',))


def test_another_target_waits_until_the_first_is_over(tmp_path):
  run = recorded(tmp_path).run
  with pytest.raises(UserError, match='by `launch tpu` and is submitted; del'):
    identity.check_free(run, 'gke')
  identity.check_free(run, 'tpu')
  identity.tell(run, 'trainer', 'finished', 'evaluate', None)
  identity.check_free(run, 'gke')


def test_streams_run_in_one_process(tmp_path):
  run = submission(tmp_path, store=None, steps=('stream', 'evaluate'))
  check_hosts(run.store is None, 1)
  with pytest.raises(UserError, match="'stream' runs in one process.*4 hosts"):
    check_hosts(run.store is None, 4)
  assert '--steps=stream' in run.worker_arguments('trainer', [], apart=True)


@pytest.mark.parametrize(
  'path, match',
  [
    ('runs/x', "--run: 'runs/x' is not in a bucket"),
    ('s3://bucket/x', 'is not in a bucket'),
    ('gs://bucket', 'gs://bucket is a whole bucket'),
    ('gs:///x', '--run: gs:///x has no bucket'),
  ],
)
def test_folders_that_other_machines_cannot_reach(path, match):
  with pytest.raises(UserError, match=match):
    identity.open_run(path, remote=True)


def test_a_folder_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  run = submission(tmp_path / 'file/run')
  with pytest.raises(UserError, match='--run: cannot write to .*permissions'):
    run.record('local', ('trainer',), {})


RECORD = """
import sys
from gsae_jax.errors import UserError
from launch import identity
from tests.support.submissions import submission
for place in sys.argv[1:]:
  run = submission(identity.open_run(place, remote=True))
  try:
    run.record('tpu', ('trainer',), {})
  except UserError as e:
    print(e)
"""


@pytest.mark.integration
def test_buckets_written_and_not_to_be_written():
  runs = 'gs://mine/a', 'gs://nobody/a', 'gs://theirs/a'
  with FakeGCS(buckets=('mine', 'theirs')) as gcs:
    gcs.closed.add('theirs')
    done = subprocess.run(
      [sys.executable, '-c', RECORD, *runs],
      cwd=ROOT,
      env=os.environ | gcs.environment,
      capture_output=True,
      text=True,
    )
  assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
  assert f'a/code/{CODE.id}.tar.gz' in gcs.objects['mine']
  assert set(gcs.objects['mine']) >= {'a/config.json', 'a/launch.json'}
  lines = done.stdout.splitlines()
  assert lines[0].startswith('--run: cannot write to gs://nobody/a (')
  assert lines[1].startswith(
    '--run: cannot write to gs://theirs/a (Forbidden: '
  )
  assert 'the caller has no right to write to theirs);' in lines[1]
  assert len(lines) == 2 and not gcs.objects['theirs']
  for line in lines:
    assert line.endswith('(gcloud auth application-default login)')


def test_a_run_that_had_finished_is_not_told_as_deleted(tmp_path):
  run = epath.Path(tmp_path)
  identity.begin(run, identity.ROLES)
  identity.tell(run, 'trainer', 'finished', 'train', None)
  identity.tell_deleted(run, identity.ROLES)
  states = [about['state'] for about in identity.told(run).values()]
  assert states == ['finished', 'deleted']
