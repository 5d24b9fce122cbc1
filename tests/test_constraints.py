"""Constraints files are plain, and cover what the stacks install."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from constraints import make
from constraints.differences import differences, read_pins
from tests.support.locations import ROOT

PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
EXTRAS = PYPROJECT['project']['optional-dependencies']
STACKS = pytest.mark.parametrize('stack', make.STACKS, ids=lambda s: s.name)


def path_of(stack):
  return make.FOLDER / f'{stack.name}.txt'


def requirements(extras):
  """What pyproject.toml asks for, with the extras that extras name."""
  found = [Requirement(r) for r in PYPROJECT['project']['dependencies']]
  found += [Requirement(r) for r in PYPROJECT['build-system']['requires']]
  names = list(extras)
  for name in names:
    for requirement in map(Requirement, EXTRAS[name]):
      if requirement.name == PYPROJECT['project']['name']:
        names += requirement.extras
      else:
        found.append(requirement)
  return found


def test_every_file_is_of_a_stack():
  files = {path.stem for path in make.FOLDER.glob('*.txt')}
  assert files == {stack.name for stack in make.STACKS}


@STACKS
def test_lines_are_names_and_exact_versions(stack):
  lines = path_of(stack).read_text().splitlines()
  for line in lines:
    assert re.fullmatch(r'[a-z0-9]+(-[a-z0-9]+)*==\d[a-z0-9.]*', line), line
  names = [line.split('==')[0] for line in lines]
  assert len(set(names)) == len(names)
  assert not [line for line in lines if make.GPU_ONLY.match(line)]


@STACKS
def test_versions_are_what_the_package_asks_for(stack):
  pins = read_pins(path_of(stack))
  wanted = requirements(stack.extras)
  wanted += [Requirement(name) for name in stack.bare]
  torch = re.search(r'^TORCH \?= (.+)$', (ROOT / 'Makefile').read_text(), re.M)
  wanted.append(Requirement(torch[1]))
  assert len(wanted) > 20
  for requirement in wanted:
    version = pins.get(canonicalize_name(requirement.name))
    assert version and version in requirement.specifier, (requirement, version)


def test_the_stacks_are_those_that_are_supported():
  jax = {s.name: read_pins(path_of(s))['jax'] for s in make.STACKS}
  assert jax['py311'].startswith('0.10.') and jax['colab'] == '0.7.2'
  colab = re.findall(r'^\w.*$', (make.FOLDER / 'colab.in').read_text(), re.M)
  assert len(colab) == 8
  assert set(colab) <= set(path_of(make.STACKS[2]).read_text().splitlines())


def test_differences():
  pinned = {'a': '1.0', 'b': '2.0', 'torch': '2.13.0', 'gone': '3'}
  installed = {'a': '1.0', 'b': '2.1', 'torch': '2.13.0+cpu', 'new': '4'}
  assert differences(pinned, installed) == [
    ('b', '2.0', '2.1'),
    ('gone', '3', '-'),
    ('new', '-', '4'),
  ]
