"""What is packed of a working tree, and what it is called."""

import io
import os
import subprocess
import tarfile

import pytest

from gsae_jax.errors import UserError
from launch import package

pytestmark = pytest.mark.integration  # Git's processes.


@pytest.fixture
def tree(tmp_path):
  """A git tree with a commit, something new and something ignored."""

  def git(*words):
    subprocess.run(
      ['git', '-c', 'user.name=n', '-c', 'user.email=e', *words],
      cwd=tmp_path,
      check=True,
      capture_output=True,
    )

  git('init')
  (tmp_path / '.gitignore').write_text('ignored\n')
  (tmp_path / 'a.py').write_text('a = 1\n')
  (tmp_path / 'gone.py').write_text('\n')
  git('add', '-A')
  git('commit', '-m', 'first')
  return tmp_path


def names(code):
  with tarfile.open(fileobj=io.BytesIO(code.archive)) as tar:
    return {m.name: m.mode for m in tar}


def test_the_tree_as_it_is(tree):
  clean = package.pack(tree)
  assert not clean.dirty and len(clean.commit) == 40
  (tree / 'ignored').write_text('secret')
  assert package.pack(tree) == clean
  (tree / 'new.py').touch()
  assert package.pack(tree).dirty
  (tree / 'new.py').unlink()
  (tree / 'gone.py').unlink()
  (tree / 'new dir').mkdir()
  (tree / 'new dir/run me.sh').write_text('x')
  os.chmod(tree / 'new dir/run me.sh', 0o755)
  changed = package.pack(tree)
  assert names(changed) == {
    '.gitignore': 0o644, 'a.py': 0o644, 'new dir/run me.sh': 0o755,
  }  # fmt: skip
  assert changed.files == tuple(sorted(names(changed)))
  assert changed.commit == clean.commit and b'gone.py' in changed.diff
  assert changed.id != clean.id


def test_the_same_files_are_the_same_bytes(tree, monkeypatch):
  first = package.pack(tree)
  os.utime(tree / 'a.py', (0, 0))
  monkeypatch.setattr('time.time', lambda: 0)
  assert package.pack(tree) == first


def test_below_the_root_and_without_a_commit(tree, tmp_path_factory):
  (tree / 'below').mkdir()
  with pytest.raises(
    UserError, match='it has no pyproject.toml, which machines'
  ):
    package.root_of(tree)
  (tree / 'pyproject.toml').touch()
  (tree / 'launch').mkdir()
  (tree / 'launch' / 'worker.py').touch()
  assert package.root_of(tree / 'below') == tree
  new = tmp_path_factory.mktemp('new')
  subprocess.run(['git', 'init'], cwd=new, check=True, capture_output=True)
  (new / 'a.py').write_text('')
  code = package.pack(new)
  assert code.commit is None and code.files == ('a.py',)


def test_no_git_tree(tmp_path):
  with pytest.raises(UserError, match='not in a git tree.*git init'):
    package.root_of(tmp_path)


def test_too_much_to_be_code(tree, monkeypatch):
  monkeypatch.setattr(package, '_MOST', 20)
  (tree / 'weights').write_bytes(b'x' * 30)
  with pytest.raises(UserError, match='list weights and others.*gitignore'):
    package.pack(tree)
