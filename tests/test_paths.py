"""Workdirs and the files in them."""

import sys

import pytest

from gsae_jax import paths
from gsae_jax.errors import UserError


def test_workdirs_are_folders_or_on_google_storage(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert paths.workdir('run') == paths.workdir(str(tmp_path / 'run'))
  assert not paths.is_remote(paths.workdir('run'))
  monkeypatch.setenv('HOME', str(tmp_path))
  assert str(paths.workdir('~/run')) == str(tmp_path / 'run')
  # A colon does not make a bucket of a folder.
  assert (
    str(paths.workdir('2026-11-21T10:00')) == f'{tmp_path}/2026-11-21T10:00'
  )
  remote = paths.workdir('gs://bucket/run')
  assert str(remote) == 'gs://bucket/run' and paths.is_remote(remote / 'a')
  for scheme in ('s3', 'hdfs'):
    with pytest.raises(UserError, match=f'checkpoints cannot be on {scheme}:'):
      paths.workdir(f'{scheme}://bucket/run')
  for place, match in (('gs://', 'has no bucket'), ('gs:/b/x', 'gs://BUCKET')):
    with pytest.raises(UserError, match=match):
      paths.workdir(place)
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  with pytest.raises(UserError, match=r'needs gcsfs; pip install .*\[gcs\]'):
    paths.workdir('gs://bucket/run')


def test_files_appear_whole(tmp_path):
  path = paths.workdir(str(tmp_path)) / 'eval' / 'a.json'
  paths.write_whole(path, 'one')
  with path.open() as reader:  # Of the old file, whatever is written now.
    paths.write_whole(path, 'two')
    assert reader.read() == 'one'
  assert path.read_text() == 'two'
  assert [p.name for p in path.parent.iterdir()] == ['a.json']
