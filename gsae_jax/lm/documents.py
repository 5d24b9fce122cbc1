"""Documents in: from files, folders and the Hugging Face hub.

A document is a string with something in it and no white space at its ends.
"""

import dataclasses
import functools
import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any

from gsae_jax.errors import UserError
from gsae_jax.lm import formats

# Tables and generated code: long runs of literals that teach nothing of Python.
# Test suites and site-packages are not in every installation.
_STDLIB_SKIPPED = {
  '__pycache__', 'dist-packages', 'encodings', 'ensurepip', 'idlelib',
  'lib2to3', 'pydoc_data', 'site-packages', 'test', 'tests', 'turtledemo',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Documents:
  """Distinct documents in an order that depends on their content alone.

  Attributes:
    texts: the documents, sorted by SHA-256, which mixes sources.
    digest: SHA-256 over all of them, the identity of the text.
  """

  texts: tuple[str, ...]
  digest: str


def document_id(text: str) -> int:
  """The first 8 bytes of the text's SHA-256, by which a store names it."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def read_documents(path: str, separator: str | None, **more: Any) -> Documents:
  """Reads and de-duplicates documents; the arguments are those of `locate`."""
  texts = {}
  for text in locate(path, separator, **more)():
    texts[hashlib.sha256(text.encode()).digest()] = text
  keys = sorted(texts)
  digest = hashlib.sha256(''.join(k.hex() for k in keys).encode()).hexdigest()
  return Documents(tuple(texts[k] for k in keys), digest)


def locate(
  path: str,
  separator: str | None,
  *,
  field: str = 'text',
  subset: str | None = None,
  split: str = 'train',
  revision: str | None = None,
) -> Callable[[], Iterator[str]]:
  """Finds a text, and checks what can be checked without reading it.

  Args:
    path: a file, a glob, a folder, a hub id, or 'stdlib' (this Python's own
      source files).
    separator: text between the documents of a plain file; None if a file is
      one.
    field: the key, or column, of the text in files that have such.
    subset: of a hub id's dataset, where it has several.
    split: of a hub id's dataset.
    revision: branch, tag or commit of a hub id.

  Returns:
    a function that reads the documents, from the first, in the order in which
    they stand.

  Raises:
    UserError: there is no such text, or an option that is not for it.
  """
  files = _files(path)
  kinds = {formats.kind(name) for name in files}
  if files:
    for name, value, usual in (
      ('subset', subset, None),
      ('split', split, 'train'),
      ('revision', revision, None),
    ):
      if value != usual:
        raise UserError(
          f'text.{name}: {value!r} is for hub ids, and {path} is on this '
          f'machine; set it to {usual!r}'
        )
    if field != 'text' and kinds == {''}:
      raise UserError(
        f'text.field: {field!r} is for JSONL, Parquet and Arrow, and {path} is '
        "plain text; set it to 'text'"
      )
    read = functools.partial(_read_files, files, separator, field)
  else:
    _check_hub_id(path)
    formats.optional('datasets', path)
    read = functools.partial(formats.hub, path, field, subset, split, revision)
  if separator is not None and '' not in kinds:
    raise UserError(
      f'text.separator: {separator!r} is for plain text, and a row of {path} '
      'is a document; set it to None'
    )
  if kinds & {'.parquet', '.arrow'}:
    formats.optional('pyarrow', path)

  def documents() -> Iterator[str]:
    none = True
    for text in read():
      text = text.strip()
      if text:
        none = False
        yield text
    if none:
      raise UserError(f'text.path: no text in {path}')

  return documents


def _files(path: str) -> list[str]:
  """The files that a path stands for; none, if it is not of this machine."""
  if path == 'stdlib':
    root = sysconfig.get_paths()['stdlib']
    files = glob.glob(os.path.join(root, '**', '*.py'), recursive=True)
    return sorted(
      f
      for f in files
      if not _STDLIB_SKIPPED & set(os.path.relpath(f, root).split(os.sep))
    )
  path = os.path.expanduser(path)
  if os.path.isdir(path):
    return _folder(path)
  if os.path.isfile(path):  # Though there may be brackets in its name.
    return [path]
  return sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))


def _folder(path: str) -> list[str]:
  state = os.path.join(path, 'state.json')
  if os.path.exists(state):  # Of `datasets.save_to_disk`.
    try:
      with open(state) as f:
        shards = json.load(f)['_data_files']
      return [os.path.join(path, shard['filename']) for shard in shards]
    except (OSError, ValueError, KeyError, TypeError) as e:
      raise UserError(
        f'text.path: {state} does not list the shards of a saved dataset '
        f'({type(e).__name__}); save it again'
      ) from e
  if os.path.exists(os.path.join(path, 'dataset_dict.json')):
    raise UserError(
      f'text.path: {path} holds several datasets; give the folder of one of '
      'them, such as ' + os.path.join(path, 'train')
    )
  known = ('.txt', '.txt.gz', '.jsonl', '.jsonl.gz', '.parquet', '.arrow')
  files = glob.glob(os.path.join(glob.escape(path), '**'), recursive=True)
  files = [f for f in files if f.lower().endswith(known) and os.path.isfile(f)]
  if not files:
    raise UserError(
      f'text.path: the folder {path} has no file that ends in '
      f'{", ".join(known)}; give a glob, which may match any plain text'
    )
  return sorted(files)


def _check_hub_id(path: str) -> None:
  """Raises UserError unless nothing but a hub id can be meant."""
  owner, _, _ = path.rpartition('/')
  plain = re.fullmatch(r'([\w-][\w.-]*/)?[\w-][\w.-]*', path)
  ending = os.path.splitext(path)[1].lower()
  if (
    not plain
    or (owner and os.path.exists(owner))  # A folder: the file is mistyped.
    or ending in ('.txt', '.gz', '.json', '.jsonl', '.parquet', '.arrow')
    or (not owner and '.' in path)
  ):
    raise UserError(
      f'text.path: no file matches {path!r}; give a file, a glob, a folder, a '
      "hub id, or 'stdlib'"
    )


def _read_files(
  names: list[str], separator: str | None, field: str
) -> Iterator[str]:
  for name in names:
    kind = formats.kind(name)
    if kind:
      yield from formats.FIELDS[kind](name, field)
    else:
      yield from formats.plain(name, separator)
