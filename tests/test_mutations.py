"""The mutations fit today's code, and their runner keeps its books."""

import ast
import collections
import hashlib
import json
import pathlib
import re
import textwrap

import pytest

from tests.mutations import runner
from tests.mutations.__main__ import parse
from tests.mutations.cases import PACKAGES, Mutation, read_mutations
from tests.mutations.selection import is_mirrored, stages
from tests.mutations.table import table

ROOT = pathlib.Path(__file__).resolve().parent.parent
MUTATIONS = read_mutations()
SETTINGS = runner.Settings({'test': 'not slow', 'test-all': 'slow'}, 60.0, 4e9)


def mutation(name='one', file='gsae_jax/sae/gated.py', **changes):
  fields = {
    'snippet': 'a + b',
    'replacement': 'a - b',
    'origin': 'hand',
    'why': 'A wrong sum.',
  }
  return Mutation(name, file, **fields | changes)


@pytest.mark.parametrize('m', MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_changes_one_place_and_compiles(m):
  source = (ROOT / m.file).read_text()
  changed = m.apply(source)
  assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
  assert m.why
  assert m.origin in ('hand', 'drawn')
  assert (m.origin == 'drawn') == (m.drawn is not None)


def test_there_are_enough_mutations_of_each_package_and_origin():
  assert len(MUTATIONS) >= 64
  assert len({(m.file, m.snippet, m.replacement) for m in MUTATIONS}) == len(
    MUTATIONS
  )
  origins = collections.Counter(m.origin for m in MUTATIONS)
  assert min(origins['hand'], origins['drawn']) >= 32
  packages = collections.Counter(m.package for m in MUTATIONS)
  assert set(packages) == set(PACKAGES.values())
  assert min(packages.values()) >= 2


@pytest.mark.parametrize(
  'm', [m for m in MUTATIONS if m.drawn], ids=lambda m: m.name
)
def test_what_was_drawn_says_by_which_hash(m):
  operator, line, digest = re.fullmatch(
    r'(\w+) of line (\d+), (\w{12})', m.drawn
  ).groups()
  assert digest in {
    hashlib.sha256(f'{m.file}:{line}:{operator}:{n}'.encode()).hexdigest()[:12]
    for n in range(20)
  }


def test_a_snippet_must_occur_exactly_once():
  assert mutation().apply('x = a + b\n') == 'x = a - b\n'
  for source, count in (('x = 1\n', 0), ('a + b + a + b\n', 2)):
    with pytest.raises(ValueError, match=f'occurs {count} times'):
      mutation().apply(source)


@pytest.mark.parametrize(
  'test, file, mirrored',
  [
    ('tests/sae/test_gated.py', 'gsae_jax/sae/gated.py', True),
    ('tests/lm/test_golden.py', 'gsae_jax/lm/families/gemma.py', True),
    ('tests/test_paths.py', 'gsae_jax/sae/gated.py', False),
    ('tests/test_paths.py', 'gsae_jax/paths.py', True),
    ('tests/sae/test_gated.py', 'gsae_jax/paths.py', False),
    ('tests/launch/test_tpu.py', 'launch/preflight/roofline.py', True),
    ('tests/test_paths.py', 'launch/preflight/roofline.py', False),
    ('tests/test_paper_toy.py', 'experiments/paper/toy.py', True),
    ('tests/test_paths.py', 'experiments/paper/toy.py', False),
  ],
)
def test_folders_mirror_packages(test, file, mirrored):
  assert is_mirrored(pathlib.PurePath(test), file) == mirrored


def test_every_mutated_file_has_tests_to_run():
  for m in MUTATIONS:
    found = stages(ROOT, m.file)
    assert found['nearest'] + found['folder'], m.file
    everything = sum(found.values(), [])
    assert len(everything) == len(set(everything))


@pytest.fixture
def tree(tmp_path):
  """A tree with one module and tests of it, near and far."""
  files = {
    'gsae_jax/sae/gated.py': 'def f(a, b):\n  return a + b\n',
    'tests/sae/test_gated.py': '',
    'tests/sae/test_far.py': 'import gsae_jax.sae.gated\n',
    'tests/sae/test_away.py': '',
    'tests/test_other.py': '',
  }
  for name, text in files.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return tmp_path


def test_stages_begin_with_the_nearest_tests(tree):
  file = 'gsae_jax/sae/gated.py'
  assert stages(tree, file) == {
    'nearest': ['tests/sae/test_gated.py'],
    'folder': ['tests/sae/test_away.py', 'tests/sae/test_far.py'],
    'tree': ['tests/test_other.py'],
  }
  (tree / 'tests/sae/test_gated.py').unlink()
  assert stages(tree, file)['nearest'] == ['tests/sae/test_far.py']


def run_with(tree, monkeypatch, stage, answers):
  """What a run makes of pytest's answers; also what pytest was run on."""
  seen = []

  def run_pytest(root, files, marks, settings):
    seen.append((files[0], marks))
    assert 'a - b' in (root / 'gsae_jax/sae/gated.py').read_text()
    return answers.get((files[0], marks), (None, None))

  monkeypatch.setattr(runner, 'run_pytest', run_pytest)
  result = runner.run_mutation(tree, mutation(), SETTINGS, stage, 60.0)
  assert 'a + b' in (tree / 'gsae_jax/sae/gated.py').read_text()
  return result, seen


def test_a_run_ends_with_the_first_failure(tree, monkeypatch):
  first = ('tests/sae/test_away.py', 'not slow')
  answers = {first: ('t::a', 'failed')}
  result, seen = run_with(tree, monkeypatch, 'folder', answers)
  assert seen == [first]
  assert result['caught'] == 't::a' and result['seconds'] >= 60.0
  assert (result['tier'], result['stage']) == ('test', 'folder')


def test_slow_tests_are_run_last(tree, monkeypatch):
  slow = ('tests/sae/test_gated.py', 'slow')
  answers = {slow: ('t::b', 'hangs')}
  result, seen = run_with(tree, monkeypatch, 'nearest', answers)
  assert seen == [('tests/sae/test_gated.py', 'not slow'), slow]
  assert (result['tier'], result['how']) == ('test-all', 'hangs')


def test_a_stage_whose_tests_pass_misses_the_mutation(tree, monkeypatch):
  result, _ = run_with(tree, monkeypatch, 'nearest', {})
  assert runner.is_missed(result, 'nearest')
  assert not runner.is_missed(result, 'folder')
  assert not runner.is_missed(None, 'nearest')
  assert not runner.is_missed(result | {'caught': 't'}, 'nearest')


def test_each_stage_is_run_for_what_those_before_missed():
  result = lambda stage, caught=None: {
    'caught': caught, 'how': None, 'stage': stage
  }  # fmt: skip
  results = {
    'a': result('nearest', 't'),
    'b': result('nearest'),
    'c': result('folder'),
    'd': result('tree'),
  }
  mutations = [mutation(name) for name in 'abcde']
  for stage, want in (('nearest', 'e'), ('folder', 'b'), ('tree', 'c')):
    left = runner.still_to_run(mutations, results, stage, 2)
    assert ''.join(m.name for m in left) == want


def test_a_snippet_that_is_gone_is_said_and_not_missed(tree):
  result = runner.run_mutation(
    tree, mutation(snippet='a * b'), SETTINGS, 'nearest'
  )
  assert result['how'].startswith('not run: one: the snippet occurs 0 times')
  assert runner.for_the_whole_tree({'one': result}, 10) == []


def test_results_are_resumed_behind_a_line_that_was_cut_short(tmp_path):
  path = tmp_path / 'results.jsonl'
  assert runner.read_results(path) == {}
  runner.append_result(path, {'name': 'one', 'caught': None})
  with path.open('a') as f:
    f.write('{"name": "tw')
  assert set(runner.read_results(path)) == {'one'}
  runner.append_result(path, {'name': 'one', 'caught': 't'})
  assert runner.read_results(path) == {'one': {'name': 'one', 'caught': 't'}}
  left = runner.still_to_run(
    [mutation('one'), mutation('two')], runner.read_results(path), 'nearest', 0
  )
  assert [m.name for m in left] == ['two']


def test_a_few_of_the_missed_meet_all_tests_once():
  missed = {'caught': None, 'how': None, 'stage': 'folder'}
  results = {f'm{i}': missed for i in range(5)}
  results['caught'] = {'caught': 't', 'how': 'failed', 'stage': 'folder'}
  drawn = runner.for_the_whole_tree(results, 3)
  assert len(drawn) == 3 and set(drawn) < set(results) - {'caught'}
  # Those that were run are of the three.
  results[drawn[0]] = {'caught': 't', 'how': 'failed', 'stage': 'tree'}
  results[drawn[1]] = {'caught': None, 'how': None, 'stage': 'tree'}
  assert runner.for_the_whole_tree(results, 3) == [drawn[2]]


def test_pytest_output_names_the_first_failure():
  text = textwrap.dedent("""\
    tests/a.py::test_a PASSED                 [ 33%]
    tests/a.py::test_b[x - y] FAILED          [ 66%]
    ==== short test summary info ====
    FAILED tests/a.py::test_b[x] - assert 1 - 1
    """)
  assert runner.first_failure(text) == ('tests/a.py::test_b[x]', 'failed')
  assert runner.first_failure('ERROR tests/a.py\n') == ('tests/a.py', 'error')
  assert runner.first_failure('1 passed\n') is None
  cut = 'tests/a.py::test_a PASSED  [ 50%]\ntests/a.py::test_b '
  assert runner.running_test(cut) == 'tests/a.py::test_b'


def test_a_table_has_a_row_for_each_mutation_and_counts():
  before = {
    'one': {
      'caught': 'tests/a.py::t[x|y]', 'how': 'hangs', 'tier': 'test',
      'stage': 'folder', 'seconds': 3.2,
    },
    'two': {
      'caught': None, 'how': None, 'tier': None, 'stage': 'folder',
      'seconds': 9.0,
    },
  }  # fmt: skip
  text = table(
    [mutation('one'), mutation('two')], {'before': before, 'now': {}}
  )
  header, _, one, two, _, counts, _ = text.split('\n')
  assert header == (
    '| mutation | file | origin | before | tier | s | now | tier | s |'
  )
  assert '`a.py::t[x\\|y]` (hangs) | test | 3 |  |  |  |' in one
  assert 'missed by its folder |  | 9 |' in two
  assert counts == 'before: 1 of 2 caught (1 by test)  '


def test_tiers_of_the_command_line_replace_the_usual_ones():
  assert list(parse([]).tier) == ['test-fast', 'test', 'test-all']
  given = parse(['--tier', 'fast=not slow', '--tier', 'slow=slow'])
  assert given.tier == {'fast': 'not slow', 'slow': 'slow'}


@pytest.mark.slow
def test_pytest_is_run_on_a_copy_and_ended_when_it_hangs(
  tree, tmp_path_factory
):
  (tree / 'tests/sae/test_gated.py').write_text(
    'import gsae_jax.sae.gated as m\n\ndef test_sum():\n  assert m.f(1, 1) == 2\n'
  )
  (tree / 'tests/sae/test_away.py').write_text(
    'import time\n\ndef test_waits():\n  time.sleep(600)\n'
  )
  for folder in ('gsae_jax', 'gsae_jax/sae'):
    (tree / folder / '__init__.py').touch()
  runner.subprocess.run(['git', 'init', '-q'], cwd=tree, check=True)
  copy = runner.copy_tree(tree, None, tmp_path_factory.mktemp('copy'))
  settings = runner.Settings({'all': 'not slow'}, 8.0, 4e9)
  caught = runner.run_mutation(copy, mutation(), settings, 'nearest')
  assert caught['caught'] == 'tests/sae/test_gated.py::test_sum'
  assert caught['how'] == 'failed'
  hangs = runner.run_mutation(
    copy, mutation(replacement='b + a'), settings, 'folder'
  )
  assert hangs['caught'] == 'tests/sae/test_away.py::test_waits'
  assert hangs['how'] == 'hangs'
  assert json.dumps(hangs)
