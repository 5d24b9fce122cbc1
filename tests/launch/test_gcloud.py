"""The lines that --dry_run shows, read by the real gcloud."""

import json
import os
import shlex
import shutil
import subprocess

import pytest

from launch import queued
from tests.support.fake_metadata import fake_metadata
from tests.support.submissions import spec


@pytest.mark.integration
@pytest.mark.parametrize(
  'changes',
  [
    {'spot': True, 'valid_hours': 2},
    pytest.param(
      {'slices': 2, 'service_account': 'me@my.com', 'network': 'mine'},
      marks=pytest.mark.slow,
    ),
  ],
)
def test_the_line_asks_for_what_the_request_does(changes, tmp_path):
  if not shutil.which('gcloud'):
    pytest.skip('gcloud is not installed')
  asked = spec(**changes)
  (tmp_path / 'startup.sh').write_text('#!script\n')
  (tmp_path / 'token').write_text('x')
  with fake_metadata() as server:
    done = subprocess.run(
      [*shlex.split(queued.gcloud_line(asked, 'run1')), '--async'],
      cwd=tmp_path,
      env=os.environ
      | server.environment
      | {
        'CLOUDSDK_AUTH_ACCESS_TOKEN_FILE': str(tmp_path / 'token'),
        'CLOUDSDK_CONFIG': str(tmp_path / 'config'),
        'CLOUDSDK_CORE_DISABLE_PROMPTS': '1',
      },
      capture_output=True,
      text=True,
    )
  assert done.returncode == 0, done.stderr
  ((method, path, _, body),) = [r for r in server.requests if r[0] == 'POST']
  assert path.startswith(f'/v2/{asked.parent}/queuedResources?')
  assert 'queuedResourceId=run1' in path
  ours = queued.to_json(queued.build(asked, 'run1', '#!script\n'))
  assert json.loads(body) == ours['queuedResource']
