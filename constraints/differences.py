"""Prints which installed versions are not those of a constraints file.

python -m constraints.differences constraints/py311.txt
"""

import importlib.metadata
import pathlib
import re
import sys


def differences(
  pinned: dict[str, str], installed: dict[str, str]
) -> list[tuple[str, str, str]]:
  """Returns (name, pinned version, installed version) where the two differ.

  '-' stands for a package that only one side has. Local versions, such as
  2.13.0+cpu, count as the version that they are builds of.
  """
  rows = []
  for name in sorted(pinned | installed):
    old, new = pinned.get(name, '-'), installed.get(name, '-')
    if old != new.partition('+')[0]:
      rows.append((name, old, new))
  return rows


def read_pins(path: pathlib.Path) -> dict[str, str]:
  return dict(line.split('==') for line in path.read_text().splitlines())


def read_installed() -> dict[str, str]:
  """Returns the versions beside the project's own, by normalised name."""
  versions = {
    re.sub(r'[-_.]+', '-', d.name).lower(): d.version
    for d in importlib.metadata.distributions()
  }
  versions.pop('gsae-jax', None)
  return versions


if __name__ == '__main__':
  rows = differences(read_pins(pathlib.Path(sys.argv[1])), read_installed())
  for row in rows:
    print('{:32} {:>16} {:>16}'.format(*row))
