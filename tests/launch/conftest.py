"""`python -m launch` in this process."""

import subprocess
import sys
import types
import warnings

import pytest

from launch import __main__, door
from tests.support.commands import call
from tests.support.locations import ROOT


@pytest.fixture
def launch(capfd, monkeypatch):
  """Exit code and output of `python -m launch` with words, in a folder."""

  def ask(*words, folder=ROOT):
    monkeypatch.chdir(folder)
    command, _, rest = __main__.find([*words])
    with warnings.catch_warnings():
      # ml_collections loads a config's file so.
      warnings.filterwarnings('ignore', 'the load_module')
      code = command.call(rest)
    return code, ''.join(capfd.readouterr())

  return ask


@pytest.fixture
def checked(monkeypatch):
  """Fields are checked by a process that stays; the arguments that it got."""
  asked = []

  def run(words, *, cwd, env, **how):
    assert words[:3] == [sys.executable, '-m', 'launch.check']
    assert cwd.samefile(ROOT) and env['JAX_PLATFORMS'] == 'cpu'
    assert how == {'capture_output': True, 'text': True}
    asked.append(words[3:])
    found = call('check', *words[3:], package='launch', config=None)
    return subprocess.CompletedProcess(words, *found)

  monkeypatch.setattr(door, 'subprocess', types.SimpleNamespace(run=run))
  return asked
