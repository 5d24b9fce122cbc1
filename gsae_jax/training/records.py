"""Reads metrics.jsonl. Needs no jax, so that the report can use it too."""

import json
from typing import Any

from etils import epath


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
  """The records in order, without the torn last line of a killed run."""
  records = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return records
