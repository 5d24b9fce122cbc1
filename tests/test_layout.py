"""Imports point down the flow only, and packaging says things once."""

import ast
import configparser
import subprocess
import sys
import tomllib

import pytest

from tests.support.locations import ROOT

PACKAGE = ROOT / 'gsae_jax'
PROGRAMS = {'harvest', 'train', 'evaluate', 'report', 'store', 'convert'}

# What each part may import of the package, beside itself and `errors`.
ALLOWED = {
  'errors': set(),
  'program': set(),
  'processes': set(),
  'paths': set(),
  'parsing': set(),
  'checks': set(),
  'mesh': set(),
  'density': set(),
  'lm': set(),
  'activations': {'lm', 'paths'},
  'sae': set(),
  'config_inputs': {'lm', 'checks'},
  'config': {'sae', 'parsing', 'checks', 'config_inputs'},
  'training': {
    'activations',
    'sae',
    'config',
    'checks',
    'paths',
    'processes',
    'density',
  },
  'evaluation': {'lm', 'sae', 'density'},
  'restore': {'sae', 'training', 'paths'},
  '__init__': {'restore'},
}


def imports(path):
  """Names below gsae_jax that a file imports, and top-level ones elsewhere."""
  inside, outside = set(), set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [(a.name, '') for a in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [(node.module, a.name) for a in node.names]
    else:
      continue
    for module, name in names:
      parts = module.split('.')
      if parts[0] == 'gsae_jax':
        inside.add(parts[1] if len(parts) > 1 else name)
      else:
        outside.add(parts[0])
  return inside, outside


@pytest.mark.parametrize(
  'path',
  sorted(PACKAGE.rglob('*.py')),
  ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_imports_point_down_the_flow(path):
  part = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
  inside, outside = imports(path)
  inside -= {part, 'errors'}
  assert not inside & PROGRAMS
  if part not in PROGRAMS:
    assert inside <= ALLOWED[part]
  foreign = {'torch', 'tensorflow', 'pickle', 'sae_lens'}
  if part == 'convert':  # Reads PyTorch's files, with the extra of that name.
    foreign.remove('torch')
  assert not outside & foreign


def test_every_file_says_what_it_is_and_fits_one_sitting():
  for path in PACKAGE.rglob('*.py'):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), path
    assert len(path.read_text().splitlines()) <= 320, path


def test_no_test_file_imports_another():
  """What several of them need is in tests/support, or a fixture."""
  for path in (ROOT / 'tests').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names = [a.name for a in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [f'{node.module or ""}.{a.name}' for a in node.names]
      else:
        continue
      words = {word for name in names for word in name.split('.')}
      own = [w for w in words if w == 'conftest' or w.startswith('test_')]
      assert not own, f'{path}, line {node.lineno}: {own}'


@pytest.mark.integration
@pytest.mark.parametrize(
  'module',
  [
    'gsae_jax',
    'gsae_jax.report',
    'gsae_jax.store',
    'gsae_jax.activations.store',
  ],
)
def test_reports_and_stores_are_read_without_jax(module):
  code = (
    f'import sys, {module}; bad = {{"jax", "flax"}} & set(sys.modules); '
    'sys.exit(repr(bad) if bad else 0)'
  )
  subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


def test_metadata_is_in_one_file_only():
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  assert not {'metadata', 'options'} & set(setup.sections())
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  extras = {'tpu', 'cuda12', 'cuda13', 'gcs', 'wandb', 'datasets', 'test'}
  assert extras <= set(project['optional-dependencies'])
  assert not any('<' in d for d in project['dependencies'])


def test_types_are_shipped_and_checked_in_every_module():
  tool = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']
  assert tool['setuptools']['package-data']['gsae_jax'] == ['py.typed']
  assert (PACKAGE / 'py.typed').read_text() == ''
  for path in [*PACKAGE.rglob('*.py'), *(ROOT / 'launch').rglob('*.py')]:
    assert '# mypy:' not in path.read_text(), path
  settings = tool['mypy']
  assert settings['files'] == ['gsae_jax', 'launch']
  assert not settings.keys() & {'exclude', 'ignore_errors'}
  for override in settings['overrides']:
    assert 'ignore_errors' not in override
    assert not any(
      m.startswith(('gsae_jax', 'launch')) for m in override['module']
    )
