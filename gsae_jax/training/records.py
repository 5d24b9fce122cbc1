"""Reads metrics.jsonl. Needs no jax, so that the report can use it too."""

import json
from typing import Any

from etils import epath

from gsae_jax.errors import UserError


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
  """The records in order, without the torn last line of a killed run.

  Raises:
    UserError: another line is not a record.
  """
  if not path.exists():
    return []
  lines = path.read_bytes().splitlines()
  records = []
  for i, line in enumerate(lines):
    try:
      record = json.loads(line.decode())
      if not (
        isinstance(record['step'], int)
        and isinstance(record['member'], str | None)
      ):
        raise TypeError('its step or its member is of another type')
    except (ValueError, TypeError, KeyError, RecursionError) as e:
      if i == len(lines) - 1:
        break
      raise UserError(
        f'--workdir: line {i + 1} of {path} is not a record of a training run; '
        'repair it or move the file away'
      ) from e
    records.append(record)
  return records
