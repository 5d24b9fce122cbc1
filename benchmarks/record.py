"""What a benchmark found: a line of JSON in `results/`, and a table.

Needs nothing but NumPy, so that the environment of the peers can import it.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterable
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'

_PACKAGES = (
  'jax', 'jaxlib', 'flax', 'numpy', 'torch', 'transformers', 'sae-lens',
  'dictionary-learning',
)  # fmt: skip


def parser(doc: str, *, rounds: int) -> argparse.ArgumentParser:
  """Flags that every benchmark has.

  Args:
    doc: of the module; its first line is the help.
    rounds: default of --rounds.
  """
  flags = argparse.ArgumentParser(
    description=doc.splitlines()[0], allow_abbrev=False
  )
  flags.add_argument('--rounds', type=int, default=rounds, help='Of turns.')
  flags.add_argument(
    '--results',
    default=str(RESULTS),
    help='Folder of the files that a line is added to.',
  )
  return flags


def spread(values: Iterable[float], unit: str) -> dict[str, Any]:
  """Median and quartiles of what was measured."""
  low, middle, high = np.quantile(list(values), (0.25, 0.5, 0.75)).tolist()
  return {'median': middle, 'quartiles': [low, high], 'unit': unit}


def memory(field: str) -> int:
  """Bytes of this process: 'VmHWM', its peak since exec, or 'VmRSS', now.

  Not getrusage, whose peak counts what the process was forked from.
  """
  with open('/proc/self/status') as f:
    (line,) = (line for line in f if line.startswith(f'{field}:'))
  return int(line.split()[1]) * 1024


def versions() -> dict[str, str]:
  """Of Python and of what is installed beside it."""
  found = {'python': platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def hardware() -> dict[str, Any]:
  """The processor, and how many of its cores there are."""
  with open('/proc/cpuinfo') as f:
    lines = [line.split(':', 1) for line in f if ':' in line]
  facts = {name.strip(): value.strip() for name, value in lines}
  return {
    'cpu': facts.get('model name', platform.machine()),
    'cores': os.cpu_count(),
    'memory_gb': round(
      os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9, 1
    ),
  }


def commit() -> dict[str, Any]:
  """The commit, and whether code was changed since; nothing outside git."""

  def git(*arguments):
    return subprocess.run(
      ['git', *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()

  try:
    changed = git('status', '--porcelain', '--', 'gsae_jax', 'benchmarks/*.py')
    return {'commit': git('rev-parse', 'HEAD'), 'changed': bool(changed)}
  except (OSError, subprocess.CalledProcessError):
    return {'commit': None, 'changed': None}


def append(
  folder: str,
  name: str,
  *,
  settings: dict[str, Any],
  rows: list[dict[str, Any]],
  **more: Any,
) -> dict[str, Any]:
  """Adds a line to `<folder>/<name>.jsonl`; returns what is in it.

  Args:
    folder: made if it is not there.
    name: of the benchmark.
    settings: what it ran with.
    rows: what it found, by name, with units.
    **more: anything else that belongs to the figures; `hardware` and
      `versions` are added to what is found here.
  """
  record = {
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    **commit(),
    **more,
    'hardware': hardware() | more.get('hardware', {}),
    'versions': versions() | more.get('versions', {}),
    'settings': settings,
    'rows': rows,
  }
  path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  with (path / f'{name}.jsonl').open('a') as f:
    f.write(json.dumps(record) + '\n')
  return record


def table(heads: list[str], rows: Iterable[list[str]]) -> str:
  """Markdown."""
  lines = [heads, ['---'] * len(heads), *rows]
  return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def show(value: dict[str, Any] | None, form: str) -> str:
  """Median with its quartiles, as a cell."""
  if value is None:
    return ''
  low, high = value['quartiles']
  return f'{value["median"]:{form}} ({low:{form}} to {high:{form}})'
