"""`python -m launch` as users run it: what is shown, and one line a mistake."""

import json
import os
import subprocess
import sys

import pytest

from tests.commands import SMOKE
from tests.conftest import ROOT

TPU = (
  'tpu', 'submit', f'--config={SMOKE}', '--run=gs://bucket/runs/run1',
  '--project=my-project', '--zone=us-west4-a', '--topology=v5e:4x4',
)  # fmt: skip


# Runs a line of words in a folder, again and again; imports once.
FORKS = """
import json, os, sys, tempfile
import gcsfs  # Long to import.
from launch import __main__, queued, script  # Without flags.
for line in sys.stdin:
  folder, words = json.loads(line)
  with tempfile.TemporaryFile('w+') as out:
    if pid := os.fork():
      code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
      out.seek(0)
      print(json.dumps([code, out.read()]), flush=True)
      continue
    os.chdir(folder)
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    try:
      __main__.main(['launch', *words])
    except SystemExit as e:
      sys.stderr.flush()
      sys.stdout.flush()
      os._exit(e.code or 0)  # In a fork, grpc takes a second to leave.
"""


@pytest.fixture(scope='module')
def launch():
  """Exit code and output of `python -m launch` with words, in a folder."""
  process = subprocess.Popen(
    [sys.executable, '-c', FORKS],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    text=True,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )

  def ask(*words, folder=ROOT):
    print(json.dumps([str(folder), words]), file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())

  with process:
    yield ask
    process.stdin.close()


def refuse(launch, *words, match, folder=ROOT):
  """One line that has `match` in it."""
  code, said = launch(*words, folder=folder)
  assert code == 1, (words, said)
  (line,) = said.splitlines()
  assert line.startswith('error: ') and match in line, line


def test_a_dry_run_shows_the_request_the_line_and_the_script(launch):
  flags = (
    '--dry_run', '--spot', '--config.train.steps=50', '--evaluator=v5e:2x2',
    '--config.train.resample_steps=(30,)',
  )  # fmt: skip
  code, rest = launch(*TPU, *flags)
  assert code == 0, rest
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


def test_one_line_for_each_mistake(launch, tmp_path):
  config = tmp_path / 'mine.py'
  config.write_text((ROOT / SMOKE).read_text())
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
    f'--config={config}': 'mine.py is not among the files that are sent',
    '--config.train.steps=0': 'config field train.steps: 0 is too small',
    '--config.train.stepz=3': (
      "--config.train.stepz: the config has no 'stepz'; did you mean 'steps'?"
    ),
    '--config.mesh.model=3': 'model=3 does not cover 16 device(s)',
    '--config.lm.path=/home/me/gemma': (
      "--config.lm.path: '/home/me/gemma' is on this machine alone; give a hub id"
    ),
    '--store=gs://': "--store: 'gs://' is not in a bucket; give gs://BUCKET/PATH",
    '--config=tests/configs/no_loader.py': 'config field loader is missing',
  }
  for flag, match in flags.items():
    refuse(launch, *TPU, flag, match=match)
  full = f'--config={ROOT / SMOKE}'
  refuse(launch, *TPU, full, folder=tmp_path, match='not in a git tree')
  refuse(launch, 'tpus', match="'tpus' is not one of preflight, tpu, gke, loc")
  refuse(launch, 'tpu', match='must be one of submit, status, watch, logs, del')
  refuse(launch, 'gke', 'submit', match='is missing; see --help')
  refuse(launch, 'tpu', 'status', '--zone=x', match="command line flag 'zone'")


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
  assert launch('local', 'status', mine) == [0, 'processes: none\n']


def test_jax_is_not_imported():
  code = (
    'import sys; from launch import door, gke, local, tpu, worker; '
    'print({"jax", "flax", "tensorstore"} & set(sys.modules))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout == 'set()\n', done.stderr
