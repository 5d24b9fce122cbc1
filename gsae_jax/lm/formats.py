"""One reader a format, each from the first document to the last.

What is wrong with a file is one line that names it, and where in it.
"""

import contextlib
import gzip
import importlib
import json
import os
import zlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from gsae_jax.errors import UserError

_PIECE = 2**20  # Characters of a plain file that are read at a time.
_BATCH = 1024  # Rows of a table.


def optional(name: str, path: str) -> ModuleType:
  """Imports what only some texts need."""
  try:
    return importlib.import_module(name)
  except ImportError as e:
    raise UserError(
      f'text.path: {path} is read with {name.split(".")[0]}, which is not '
      "installed; pip install 'gsae_jax[datasets]'"
    ) from e


def kind(name: str) -> str:
  """The suffix of a file that has fields; '' for plain text."""
  ending = os.path.splitext(name.lower().removesuffix('.gz'))[1]
  return ending if ending in FIELDS else ''


def _string(value: Any, field: str, where: str) -> str:
  if not isinstance(value, str):
    raise UserError(
      f'text.field: {where}: {field!r} is {type(value).__name__}, not a string; '
      'name the field of the text, or leave such rows out'
    )
  return value


def _check_field(field: str, fields: list[str], where: str) -> None:
  if field not in fields:
    raise UserError(
      f'text.field: {where} has no {field!r}; it has '
      f'{", ".join(map(repr, fields)) or "no field"}'
    )


@contextlib.contextmanager
def _open(name: str):
  """The file as text, unpacked; what goes wrong with it is one line."""
  opened = gzip.open if name.lower().endswith('.gz') else open
  try:
    with opened(name, 'rt', encoding='utf-8', errors='replace') as f:
      yield f
  except (OSError, EOFError, zlib.error) as e:
    raise UserError(f'text.path: cannot read {name}: {e}') from e


def plain(name: str, separator: str | None) -> Iterator[str]:
  """What stands between separators; without one, the file."""
  with _open(name) as f:
    # Pieces of a document that goes on, and the last characters read, which may
    # be the beginning of a separator: each character is looked at once.
    pieces: list[str] = []
    last = ''
    while piece := f.read(_PIECE):
      if '\0' in piece:
        raise UserError(
          f'text.path: {name} is not plain text in UTF-8; give .jsonl, '
          '.parquet or .arrow files their endings, and convert others'
        )
      last += piece
      if separator:
        *whole, last = last.split(separator)
        for end in whole:
          yield ''.join([*pieces, end])
          pieces = []
      keep = max(len(last) - len(separator or '') + 1, 0)
      pieces.append(last[:keep])
      last = last[keep:]
    yield ''.join([*pieces, last])


def jsonl(name: str, field: str) -> Iterator[str]:
  """One value of each line's object."""
  with _open(name) as f:
    for number, line in enumerate(f, 1):
      if line.isspace():
        continue
      where = f'{name}, line {number}'
      try:
        row = json.loads(line)
      except ValueError as e:
        raise UserError(
          f'text.path: {where} is not JSON ({e}); repair it or take it out'
        ) from e
      if not isinstance(row, dict):
        raise UserError(
          f'text.path: {where} is not a JSON object; repair it or take it out'
        )
      _check_field(field, list(row), where)
      yield _string(row[field], field, where)


@contextlib.contextmanager
def _arrow_errors(name: str):
  from pyarrow import ArrowException

  try:
    yield
  except (OSError, ArrowException) as e:
    reason = ' '.join(str(e).split())
    raise UserError(
      f'text.path: cannot read {name}: {reason}; download it again'
    ) from e


def parquet(name: str, field: str) -> Iterator[str]:
  """The values of one column, row group by row group."""
  pq = optional('pyarrow.parquet', name)
  with _arrow_errors(name), pq.ParquetFile(name) as f:
    _check_field(field, f.schema_arrow.names, name)
    yield from _column(f.iter_batches(_BATCH, columns=[field]), name, field)


def arrow(name: str, field: str) -> Iterator[str]:
  """The values of one column of a file of `datasets`."""
  pa = optional('pyarrow', name)
  with (
    _arrow_errors(name),
    pa.memory_map(name) as f,
    pa.ipc.open_stream(f) as batches,
  ):
    _check_field(field, batches.schema.names, name)
    yield from _column(batches, name, field)


def _column(batches: Iterator[Any], name: str, field: str) -> Iterator[str]:
  number = 0
  for batch in batches:
    for start in range(0, len(batch), _BATCH):
      for value in batch.column(field).slice(start, _BATCH).to_pylist():
        yield _string(value, field, f'{name}, row {number}')
        number += 1


def hub(
  path: str, field: str, subset: str | None, split: str, revision: str | None
) -> Iterator[str]:
  """One value of each row of a dataset, as it arrives.

  Args:
    path: a hub id; `datasets` takes a folder of files as well.
    field: which value.
    subset: None where the dataset has only one.
    split: of the dataset.
    revision: branch, tag or commit; None is the default branch.
  """
  datasets = optional('datasets', path)

  def attempt(step, *args, **kwargs):
    try:
      return step(*args, **kwargs)
    except Exception as e:  # A dozen network and hub errors, all the same here.
      reason = ' '.join(str(e).split())[:200]
      raise UserError(
        f'text.path: {path!r} is neither here nor could it be read from the hub '
        f'({type(e).__name__}: {reason}); check text.subset, text.split and '
        'text.revision, or download it where there is a network and give the '
        'folder'
      ) from e

  rows = attempt(
    datasets.load_dataset,
    path,
    name=subset,
    split=split,
    revision=revision,
    streaming=True,
  )
  if rows.column_names is not None:  # Which not every dataset says beforehand.
    _check_field(field, rows.column_names, path)
    rows = rows.select_columns([field])
  rows = iter(rows)
  end = object()
  number = 0
  while (row := attempt(next, rows, end)) is not end:
    _check_field(field, list(row), f'{path}, row {number}')
    yield _string(row[field], field, f'{path}, row {number}')
    number += 1


FIELDS = {'.jsonl': jsonl, '.parquet': parquet, '.arrow': arrow}
