"""Runs the tests against mutated copies of the tree, and keeps what caught each."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from tests.mutations.cases import Mutation
from tests.mutations.selection import stages

_POLL = 0.2  # Seconds.
_PAGE = os.sysconf('SC_PAGE_SIZE')


@dataclasses.dataclass(frozen=True)
class Settings:
  """How mutations are run.

  Attributes:
    tiers: mark expressions by name; the tests of the first are run first.
    limit: seconds without a test that begins or ends, after which it hangs.
    memory: bytes that pytest and its child processes may take together.
    deselected: ids of tests that fail without a mutation.
  """

  tiers: dict[str, str]
  limit: float
  memory: float
  deselected: tuple[str, ...] = ()


def read_results(path: pathlib.Path) -> dict[str, dict]:
  """Returns the latest result of each mutation; a line cut short is left out."""
  found = {}
  if path.exists():
    for line in path.read_text().splitlines():
      with contextlib.suppress(ValueError):
        result = json.loads(line)
        found[result['name']] = result
  return found


def append_result(path: pathlib.Path, result: dict) -> None:
  """Appends a line, behind a line break where the last one was cut short."""
  text = path.read_text() if path.exists() else ''
  start = '\n' if text and not text.endswith('\n') else ''
  with path.open('a') as f:
    f.write(f'{start}{json.dumps(result)}\n')


def still_to_run(
  mutations: list[Mutation], results: dict[str, dict], stage: str, most: int
) -> list[Mutation]:
  """Returns the mutations that a stage is to be run for.

  Args:
    mutations: all of them.
    results: what is known of them.
    stage: 'nearest' for those of which nothing is known; 'folder' for those that
      the nearest tests missed; 'tree' for a few of those that the folder missed.
    most: how many have the whole tree run for them in all, drawn by hash.
  """
  if stage == 'nearest':
    return [m for m in mutations if m.name not in results]
  if stage == 'tree':
    drawn = for_the_whole_tree(results, most)
    return [m for m in mutations if m.name in drawn]
  return [m for m in mutations if is_missed(results.get(m.name), 'nearest')]


def is_missed(result: dict | None, stage: str) -> bool:
  """Whether all tests up to a stage, and no further, were run and passed."""
  return (
    result is not None
    and result['caught'] is None
    and result['how'] is None
    and result['stage'] == stage
  )


def for_the_whole_tree(results: dict[str, dict], most: int) -> list[str]:
  """Names of at most so many of those that their folder misses, drawn by hash."""
  missed = [
    name
    for name, result in results.items()
    if is_missed(result, 'folder') or result['stage'] == 'tree'
  ]
  digest = lambda name: hashlib.sha256(name.encode()).hexdigest()
  return [
    name
    for name in sorted(missed, key=digest)[:most]
    if results[name]['stage'] != 'tree'
  ]


def copy_tree(
  tree: pathlib.Path, commit: str | None, folder: pathlib.Path
) -> pathlib.Path:
  """Copies a tree to a new folder, next to a link to its `../shared`.

  Args:
    tree: root of a git work tree.
    commit: what to copy; None is the files as they are now.
    folder: gets the copy, a repository with one commit.

  Returns:
    the copy's root.
  """
  root = folder / 'tree'
  root.mkdir()
  git = lambda *words, cwd=tree, **more: subprocess.run(
    ['git', *words], cwd=cwd, check=True, **more
  )
  if commit is None:
    listed = git(
      'ls-files', '-co', '--exclude-standard', '-z', capture_output=True
    ).stdout
    names = [n for n in listed.decode().split('\0') if (tree / n).is_file()]
    names = '\0'.join(names).encode()
    pack = ['tar', '-c', '--null', '-T', '-']
    packed = subprocess.run(
      pack, cwd=tree, input=names, capture_output=True, check=True
    ).stdout
  else:
    packed = git('archive', commit, capture_output=True).stdout
  subprocess.run(['tar', '-x'], cwd=root, input=packed, check=True)
  # Tests clone the tree, and read its commit.
  git('init', '-q', cwd=root)
  git('add', '-A', cwd=root)
  who = ('-c', 'user.name=mutations', '-c', 'user.email=mutations')
  git(*who, 'commit', '-q', '-m', 'Copy of the tree', cwd=root)
  for name, place in (('shared', folder), ('.venv/libtpu', root)):
    source = tree.parent / name if name == 'shared' else tree / name
    if source.is_dir():
      target = place / name
      target.parent.mkdir(exist_ok=True)
      target.symlink_to(source.resolve())
  return root


@contextlib.contextmanager
def mutated(root: pathlib.Path, mutation: Mutation) -> Iterator[None]:
  """Applies a mutation to the tree for the length of the block."""
  path = root / mutation.file
  source = path.read_text()
  path.write_text(mutation.apply(source))
  try:
    yield
  finally:
    path.write_text(source)


def run_mutation(
  root: pathlib.Path,
  mutation: Mutation,
  settings: Settings,
  stage: str,
  before: float = 0.0,
) -> dict:
  """Runs a stage's tests of one mutation, tier by tier, until one fails.

  Args:
    root: of a copy of the tree.
    mutation: which.
    settings: how.
    stage: of `selection.stages`.
    before: seconds that earlier stages took.

  Returns:
    `name`, `file` and `origin`; `caught`, the id of the test that failed, or
    None; `how`, 'failed', 'error', 'hangs' or 'memory'; the `tier` of that test;
    the `stage`; and `seconds` of all stages.
  """
  result = {
    'name': mutation.name,
    'file': mutation.file,
    'origin': mutation.origin,
    'caught': None,
    'how': None,
    'tier': None,
    'stage': stage,
    'seconds': before,
  }
  begun = time.monotonic()
  try:
    mutation.apply((root / mutation.file).read_text())
  except (OSError, ValueError) as e:
    return result | {'how': f'not run: {e}'}
  files = stages(root, mutation.file)[stage]
  with mutated(root, mutation):
    for tier, marks in settings.tiers.items():
      if files and result['caught'] is None:
        caught, how = run_pytest(root, files, marks, settings)
        if caught is not None:
          result |= {'caught': caught, 'how': how, 'tier': tier}
  seconds = before + time.monotonic() - begun
  return result | {'seconds': round(seconds, 1)}


def run_pytest(
  root: pathlib.Path, files: list[str], marks: str, settings: Settings
) -> tuple[str | None, str | None]:
  """Runs test files until the first failure.

  Returns:
    the id of the test that failed and how, or twice None.

  Raises:
    RuntimeError: pytest itself could not do its work.
  """
  command = [sys.executable, '-m', 'pytest', '-x', '-v', '--tb=no']
  command += ['-p', 'no:randomly', '-p', 'no:cacheprovider', '-m', marks]
  command += [f'--deselect={test}' for test in settings.deselected]
  with tempfile.TemporaryFile('w+') as out:
    process = subprocess.Popen(
      [*command, *files],
      cwd=root,
      # One that is killed may leave half an entry.
      env=os.environ | {'GSAE_TEST_CACHE': str(root.parent / 'cache')},
      stdin=subprocess.DEVNULL,
      stdout=out,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )
    ended = _wait(process, out, root, settings)
    out.seek(0)
    text = out.read()
  if ended is not None:
    return running_test(text) or files[0], ended
  if process.returncode in (0, 5):  # All passed; none is of these marks.
    return None, None
  caught = first_failure(text)
  if caught is None:
    # A mutation may end the interpreter.
    caught = (running_test(text), 'error')
    if caught[0] is None:
      raise RuntimeError(f'pytest exits with {process.returncode}:\n{text}')
  return caught


def _wait(
  process: subprocess.Popen, out, root: pathlib.Path, settings: Settings
) -> str | None:
  """Waits for a process and ends what it started.

  Returns:
    'hangs' or 'memory' where the process was ended, else None.
  """
  size, since, ended = 0, time.monotonic(), None
  try:
    while process.poll() is None and ended is None:
      time.sleep(_POLL)
      now = os.fstat(out.fileno()).st_size
      if now != size:
        size, since = now, time.monotonic()
      if time.monotonic() - since > settings.limit:
        ended = 'hangs'
      # An endless loop may take all memory before it takes all time.
      if sum(_session(process.pid).values()) > settings.memory:
        ended = 'memory'
  finally:
    # Workers of `launch local` have sessions of their own.
    for pid in {*_session(process.pid), *_working_in(root)}:
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    process.wait()
  return ended


def _session(session: int) -> dict[int, int]:
  """Bytes in memory of a session's processes, in whichever groups they are."""
  found = {}
  for stat in pathlib.Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(OSError, ValueError, IndexError):
      # Behind the command: state, parent, group, session, ..., pages.
      fields = stat.read_text().rpartition(')')[2].split()
      if int(fields[3]) == session:
        found[int(stat.parent.name)] = int(fields[21]) * _PAGE
  return found


def _working_in(folder: pathlib.Path) -> list[int]:
  """Returns the processes whose working directory is the folder."""
  found = []
  for cwd in pathlib.Path('/proc').glob('[0-9]*/cwd'):
    with contextlib.suppress(OSError):
      if cwd.readlink() == folder.resolve():
        found.append(int(cwd.parent.name))
  return found


def first_failure(text: str) -> tuple[str, str] | None:
  """The first failure in pytest's short summary: the test's id, and how."""
  found = re.search(r'^(FAILED|ERROR) (.+?)( - .*)?$', text, re.MULTILINE)
  if found is None:
    return None
  return found[2], 'failed' if found[1] == 'FAILED' else 'error'


def running_test(text: str) -> str | None:
  """The test that pytest began last, from its verbose output."""
  begun = re.findall(r'^(tests/\S+::.+?)(?: [A-Z]+ .*| )?$', text, re.MULTILINE)
  return begun[-1].strip() if begun else None
