"""`python -m launch` as users run it: what is shown, and one line a mistake."""

import json
import subprocess
import sys

import pytest

from launch import __main__
from tests.support.commands import SMOKE
from tests.support.locations import ROOT

TPU = (
  'tpu', 'submit', f'--config={SMOKE}', '--run=gs://bucket/runs/run1',
  '--project=my-project', '--zone=us-west4-a', '--topology=v5e:4x4',
  '--dry_run',
)  # fmt: skip


def refuse(launch, *words, match, folder=ROOT):
  """One line that has `match` in it."""
  code, said = launch(*words, folder=folder)
  assert code == 1, (words, said)
  (line,) = said.splitlines()
  assert line.startswith('error: ') and match in line, line


@pytest.mark.integration
def test_a_dry_run_shows_the_request_the_line_and_the_script(launch, checked):
  flags = (
    '--spot', '--config.train.steps=50', '--evaluator=v5e:2x2',
    '--config.train.resample_steps=(30,)',
  )  # fmt: skip
  code, rest = launch(*TPU, *flags)
  assert code == 0, rest
  assert checked == [[
    f'--config={SMOKE}', '--config.train.steps=50',
    '--config.train.resample_steps=(30,)', '--chips=16',
  ]]  # fmt: skip
  found = []
  while rest.strip():
    request, end = json.JSONDecoder().raw_decode(rest)
    script, line, rest = rest[end:].partition('\ngcloud ')
    line, _, rest = rest.partition('\n')
    found.append((request, script.partition('\n#!')[2], line))
  (trainer, script, line), (evaluator, script2, line2) = found
  (node,) = trainer['queuedResource']['tpu']['nodeSpec']
  assert node['node']['acceleratorType'] == 'v5litepod-16'
  assert node['node']['metadata']['startup-script'] == f'#!{script}'
  assert "'--steps=harvest,train'\n" in script
  assert f"'--config={SMOKE}'\n  '--config.train.steps=50'\n" in script
  assert "'--config.train.resample_steps=(30,)'\n" in script
  assert '--accelerator-type=v5litepod-16' in line and '--spot' in line
  assert evaluator['queuedResourceId'] == 'run1-eval'
  assert "'--steps=follow'" in script2 and 'v5litepod-4' in line2


def test_one_line_for_each_mistake(launch):
  flags = {
    '--zone=us-west4': "--zone: 'us-west4' is a region",
    '--topology=v5e:5x5': "unknown topology '5x5' of v5e",
    '--evaluator=a100:8': "--evaluator: unknown accelerator 'a100:8'",
    '--run=runs/run1': 'is not in a bucket',
    '--run=gs://bucket/Run_1': "its last part, 'Run_1', names",
    '--store=store': "--store: 'store' is not in a bucket",
    '--steps=train,test': "--steps: 'test' is not one of harvest",
    '--env=NAME': "--env: 'NAME' is not NAME=VALUE",
    '--env=NÄME=x': "--env: 'NÄME=x' is not NAME=VALUE",
    '--topologie=v5e:4x4': "Unknown command line flag 'topologie'",
    '--config=nowhere.py': 'nowhere.py',
    '--config.train.stepz=3': (
      "--config.train.stepz: the config has no 'stepz'; did you mean 'steps'?"
    ),
    '--store=gs://': "--store: 'gs://' is not in a bucket; give gs://BUCKET/PATH",
  }
  for flag, match in flags.items():
    refuse(launch, *TPU, flag, match=match)
  refuse(launch, 'gke', 'submit', match='is missing; see --help')
  refuse(launch, 'tpu', 'status', '--zone=x', match="command line flag 'zone'")


@pytest.mark.integration
def test_a_config_that_cannot_be_sent_is_one_line(launch, checked, tmp_path):
  config = tmp_path / 'mine.py'
  config.write_text((ROOT / SMOKE).read_text())
  flags = {
    f'--config={config}': 'mine.py is not among the files that are sent',
    '--config.mesh.model=3': 'model=3 does not cover 16 device(s)',
    '--config.lm.path=/home/me/gemma': (
      "--config.lm.path: '/home/me/gemma' is on this machine alone; give a hub id"
    ),
    '--config=tests/configs/no_loader.py': 'config field loader is missing',
  }
  for flag, match in flags.items():
    refuse(launch, *TPU, flag, match=match)
  assert len(checked) == 3
  full = f'--config={ROOT / SMOKE}'
  refuse(launch, *TPU, full, folder=tmp_path, match='not in a git tree')


@pytest.mark.integration
def test_fields_are_checked_in_a_process_of_its_own(launch):
  match = 'config field train.steps: 0 is too small'
  refuse(launch, *TPU, '--config.train.steps=0', match=match)


@pytest.mark.parametrize(
  'words, match',
  [
    (['tpus'], "'tpus' is not one of preflight, tpu, gke, local; see"),
    (['tpu'], 'the next word must be one of submit, status, watch, logs, del'),
  ],
)
def test_words_that_name_no_command(capsys, words, match):
  with pytest.raises(SystemExit) as leave:
    __main__.main(['launch', *words])
  (line,) = capsys.readouterr().err.splitlines()
  assert leave.value.code == 1 and line.startswith('error: ') and match in line


def test_runs_that_were_never_submitted_or_elsewhere(launch, tmp_path):
  def folder(name, **files):
    (tmp_path / name).mkdir()
    for file, value in files.items():
      (tmp_path / name / f'{file}.json').write_text(json.dumps(value))
    return f'--run={tmp_path / name}'

  local = {'target': 'local', 'pids': []}
  gke = folder('gke', launch={'target': 'gke'})
  mine = folder('mine', launch=local, config={'seed': 7})
  new = folder('new')
  refuse(launch, 'local', 'status', new, match='was never submitted')
  refuse(launch, 'local', 'watch', gke, match='submitted by `launch gke`')
  refuse(launch, 'local', 'logs', mine, match='logs has none of')
  match = 'mine has another config'
  refuse(launch, 'local', 'status', mine, f'--config={SMOKE}', match=match)
  assert launch('local', 'status', mine) == (0, 'processes: none\n')


@pytest.mark.integration
def test_jax_is_not_imported():
  code = (
    'import sys; from launch import door, gke, local, tpu, worker; '
    'print({"jax", "flax", "tensorstore"} & set(sys.modules))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout == 'set()\n', done.stderr
