"""The code that a run uses: the working tree as it is, committed or not."""

import dataclasses
import gzip
import hashlib
import io
import pathlib
import subprocess
import tarfile

from gsae_jax.errors import UserError

_MOST = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Code:
  """A packed tree.

  Attributes:
    id: of its content: the same files have the same one.
    commit: what is checked out, or None if nothing was ever committed.
    files: paths below the root.
    archive: a tar.gz, the same bytes for the same files.
    diff: what differs from the commit, but for files that git does not know.
    unknown: those files.
  """

  id: str
  commit: str | None
  files: tuple[str, ...]
  archive: bytes
  diff: bytes
  unknown: tuple[str, ...] = ()

  @property
  def dirty(self) -> bool:
    return bool(self.diff or self.unknown)


def root_of(folder: pathlib.Path) -> pathlib.Path:
  """The top of the git tree that a folder is in.

  Raises:
    UserError: it is in none.
  """
  clone = 'start from a clone of the repository'
  try:
    top = _git(folder, 'rev-parse', '--show-toplevel')
  except FileNotFoundError as e:
    raise UserError('git is not installed; a run records its commit') from e
  except subprocess.CalledProcessError as e:
    raise UserError(
      f'{folder} is not in a git tree, and a run records its commit; {clone}, or '
      'make a copy one: git init && git add -A'
    ) from e
  root = pathlib.Path(top.decode().strip())
  for name in ('pyproject.toml', 'launch/worker.py'):
    if not (root / name).is_file():
      raise UserError(
        f'{root}: it has no {name}, which machines install and start; {clone}, '
        'with your own files in it'
      )
  return root


def pack(root: pathlib.Path) -> Code:
  """Packs what git tracks, and what is new and not ignored.

  Raises:
    UserError: it is too much to be code.
  """
  unknown = _listed(root, '-oz', '--exclude-standard')
  names = sorted({*_listed(root, '-cz'), *unknown})
  size = sum((root / n).stat().st_size for n in names)
  if size > _MOST:
    largest = max(names, key=lambda n: (root / n).stat().st_size)
    raise UserError(
      f'{root}: its files have {size / 2**20:.0f} MB, more than '
      f'{_MOST // 2**20}; list {largest} and others like it in .gitignore'
    )
  raw = io.BytesIO()
  with tarfile.open(fileobj=raw, mode='w', format=tarfile.PAX_FORMAT) as tar:
    for name in names:
      data = (root / name).read_bytes()
      entry = tarfile.TarInfo(name)
      entry.size = len(data)
      executable = (root / name).stat().st_mode & 0o100
      entry.mode = 0o755 if executable else 0o644
      tar.addfile(entry, io.BytesIO(data))
  archive = gzip.compress(raw.getvalue(), mtime=0)
  try:
    commit = _git(root, 'rev-parse', '--verify', 'HEAD').decode().strip()
    diff = _git(root, 'diff', '--binary', '--no-ext-diff', '--no-color', 'HEAD')
  except subprocess.CalledProcessError:  # Nothing was ever committed.
    commit, diff = None, b''
  return Code(
    id=hashlib.sha256(raw.getvalue()).hexdigest()[:16],
    commit=commit,
    files=tuple(names),
    archive=archive,
    diff=diff,
    unknown=tuple(unknown),
  )


def _listed(root: pathlib.Path, *which: str) -> list[str]:
  names = _git(root, 'ls-files', *which).decode().split('\0')
  return [name for name in names if (root / name).is_file()]


def _git(folder: pathlib.Path, *arguments: str) -> bytes:
  return subprocess.run(
    ['git', *arguments], cwd=folder, check=True, capture_output=True
  ).stdout
