"""The start-up script: shellcheck's opinion, and run against loopback."""

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile

import pytest

from launch import package
from launch.script import startup_script
from tests.support.commands import wait_for
from tests.support.fake_gcs import FakeGCS
from tests.support.fake_metadata import fake_metadata
from tests.support.submissions import submission

pytestmark = pytest.mark.integration

RUN = 'gs://bucket/runs/run1'
VALUE = 'it\'s "$HOME" `x`\n& more'

# In the places of uv and Python; the latter waits for a signal if it is told to.
UV = """#!/bin/bash
echo "uv $*"
[[ -e $GSAE_HOME/broken ]] && exit 3
if [[ $1 == venv ]]; then
  mkdir -p "${@: -1}/bin"
  ln -s "$GSAE_HOME/bin/python" "${@: -1}/bin/python"
fi
"""
# Notes what every user of a machine could see.
CURL = f"""#!/bin/bash
echo "$*" >>"$GSAE_HOME/curls"
exec {shutil.which('curl')} "$@"
"""
PYTHON = f"""#!{sys.executable}
import json, os, signal, sys
seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append('SIGTERM'))
home = os.environ['GSAE_HOME']
found = {{'argv': sys.argv[1:], 'cwd': os.getcwd(), 'pid': os.getpid(),
         'VALUE': os.environ['VALUE']}}
with open(f'{{home}}/found.part', 'w') as f:
  json.dump(found, f)
os.rename(f'{{home}}/found.part', f'{{home}}/found')
if os.path.exists(f'{{home}}/wait'):
  signal.pause()
  sys.exit(42 if seen else 0)
"""


def tarball():
  raw = io.BytesIO()
  with tarfile.open(fileobj=raw, mode='w') as tar:
    entry = tarfile.TarInfo('a.py')
    entry.size = 1
    tar.addfile(entry, io.BytesIO(b'a'))
  return gzip.compress(raw.getvalue())


def script(value=VALUE, **changes):
  code = package.Code('c0de', 'c0ffee', ('a.py',), tarball(), b'')
  return startup_script(
    submission(RUN, code=code, **changes),
    'trainer',
    apart=False,
    date='2026-11-28T00:00:00Z',
    environment={'VALUE': value},
    queued_resource='projects/p/locations/z/queuedResources/run1',
  )


def test_shellcheck_finds_nothing(tmp_path):
  file = tmp_path / 'startup.sh'
  file.write_text(script(value='plain'))
  checked = subprocess.run(
    [os.path.join(os.path.dirname(sys.executable), 'shellcheck'), file],
    capture_output=True,
    text=True,
  )
  assert checked.returncode == 0, checked.stdout


def test_wandb_is_installed_where_it_is_written_to():
  config = {'train': {'writers': ['tensorboard', 'wandb']}}
  assert "GSAE_EXTRAS='tpu,gcs,datasets,wandb'\n" in script(config=config)
  assert "GSAE_EXTRAS='tpu,gcs,datasets'\n" in script()


class Host:
  """A machine that has uv, and what it is given."""

  def __init__(self, folder, gcs, metadata):
    self.home, self.gcs = folder, gcs
    (folder / 'bin').mkdir()
    for name, text in (('uv', UV), ('python', PYTHON), ('curl', CURL)):
      (folder / 'bin' / name).write_text(text)
      (folder / 'bin' / name).chmod(0o755)
    self._env = os.environ | gcs.environment | metadata.environment
    path = f'{folder}/bin:{os.environ["PATH"]}'
    self._env |= {'GSAE_HOME': str(folder), 'PATH': path}
    gcs.accounts.clear()

  def start(self):
    file = self.home / 'startup.sh'
    file.write_text(script())
    return subprocess.Popen(
      ['bash', file],
      env=self._env,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )

  def found(self):
    return json.loads((self.home / 'found').read_text())

  def fetched(self):
    return [r for r in self.gcs.requests if r[0] == 'GET media']


@pytest.fixture
def host(tmp_path):
  with FakeGCS(buckets=('bucket',)) as gcs, fake_metadata() as metadata:
    gcs.answer(
      'POST',
      '/upload/storage/v1/b/bucket/o?uploadType=media'
      '&name=runs%2Frun1%2Fcode%2Fc0de.tar.gz',
      {},
      tarball(),
    )
    yield Host(tmp_path, gcs, metadata)


def test_a_host_becomes_the_worker_at_each_start(host):
  process = host.start()
  _, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  found = host.found()
  assert found['argv'] == [
    '-m', 'launch.worker', f'--run={RUN}', '--role=trainer',
    '--steps=harvest,train,evaluate', f'--store={RUN}/store', '--notices',
    '--queued_resource=projects/p/locations/z/queuedResources/run1', '--',
    '--config=c.py:arg', "--config.lm.path=it's", '--coordinator=auto',
  ]  # fmt: skip
  assert found['VALUE'] == VALUE
  assert found['cwd'] == str(host.home / 'c0de')
  assert (host.home / 'c0de/a.py').read_text() == 'a'
  # The shell is gone: a signal to what was started reaches Python.
  assert found['pid'] == process.pid
  installed = (host.home / 'startup.log').read_text()
  assert '--exclude-newer 2026-11-28T00:00:00Z --editable' in installed
  assert f'{host.home}/c0de[tpu,gcs,datasets]' in installed
  # The machine was started again.
  (host.home / 'wait').touch()
  (host.home / 'found').unlink()
  process = host.start()
  wait_for((host.home / 'found').exists, process)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=60) == 42
  process.communicate()
  assert len(host.fetched()) == 1


def test_fetching_is_tried_again(host):
  blob = host.gcs.objects['bucket'].pop('runs/run1/code/c0de.tar.gz')
  process = host.start()
  wait_for(lambda: host.fetched(), process)
  host.gcs.objects['bucket']['runs/run1/code/c0de.tar.gz'] = blob
  _, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  assert 'fetch failed; again in 1 s' in (host.home / 'startup.log').read_text()


def test_what_goes_wrong_before_the_worker_is_in_the_run(host):
  (host.home / 'broken').touch()
  sleep = host.home / 'bin' / 'sleep'  # Two minutes of them.
  sleep.write_text('#!/bin/sh\n')
  sleep.chmod(0o755)
  process = host.start()
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 3
  (name,) = [n for n in host.gcs.objects['bucket'] if '/logs/startup/' in n]
  kept = host.gcs.objects['bucket'][name].data.decode()
  assert 'uv venv --allow-existing' in kept and kept == out
  told = host.gcs.objects['bucket']['runs/run1/state/trainer.json'].data
  told = json.loads(told)
  assert told['state'] == 'failed' and told['step'] == 'startup'
  assert told['reason'] == f'{name.partition("run1/")[2]} says why'
  assert told.keys() == {'state', 'step', 'reason', 'time'}
  assert host.gcs.accounts == {'Bearer ya29.a-b_c'}
  curls = (host.home / 'curls').read_text()
  assert curls.count('/upload/') == 2 and 'ya29' not in curls
  assert not (host.home / 'found').exists()
