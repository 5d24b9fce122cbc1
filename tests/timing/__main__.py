r"""Measures the suite, and writes what it found to files.csv and CONTRIBUTING.md.

  python -m tests.timing                    everything but the campaigns
  python -m tests.timing --read FOLDER      of a run with TEST_TIMINGS=FOLDER

Run it on a machine that does nothing else, with an empty compilation cache:
GSAE_TEST_CACHE=$(mktemp -d). files.csv decides in which order files are run.
"""

import argparse
import collections
import csv
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from tests.support.locations import ROOT
from tests.timing.table import FILE

PAGE = ROOT / 'CONTRIBUTING.md'
START, END = '<!-- timing: start -->\n', '<!-- timing: end -->\n'
LONGEST = 20
CAUSES = 'imports', 'compile', 'waiting'


def measure(folder: pathlib.Path) -> None:
  """Runs the suite and leaves a file of lines for each process in the folder."""
  command = [
    sys.executable, '-m', 'pytest', '-q', '-p', 'tests.timing.plugin',
    '-n', '2', '--dist', 'loadfile', '--no-loadscope-reorder',
    '-m', 'not campaign', '--durations=0',
  ]  # fmt: skip
  subprocess.run(
    command, cwd=ROOT, env=os.environ | {'TEST_TIMINGS': str(folder)}
  )


def read(folder: pathlib.Path) -> dict[str, dict[str, float]]:
  """Returns sums of seconds by test file, the longest first."""
  found: dict[str, dict[str, float]] = {}
  for path in sorted(folder.glob('*.jsonl')):
    for line in path.read_text().splitlines():
      record = json.loads(line)
      name = record['test'].partition('::')[0]
      sums = found.setdefault(name, collections.Counter())
      sums['tests'] += 1
      for key in ('wall', 'cpu', *CAUSES):
        sums[key] += record[key]
  return dict(sorted(found.items(), key=lambda item: -item[1]['wall']))


def row(name: str, sums: dict[str, float]) -> str:
  """Returns a line of the table."""
  shares = [sums[cause] / sums['wall'] for cause in CAUSES]
  shares.insert(2, max(0.0, 1 - sum(shares)))
  cells = [name, f'{sums["tests"]:.0f}', f'{sums["wall"]:.0f}']
  cells += [f'{sums["cpu"]:.0f}', *(f'{share:.0%}' for share in shares)]
  return f'| {" | ".join(cells)} |\n'


def table(found: dict[str, dict[str, float]]) -> str:
  """Returns the table of CONTRIBUTING.md."""
  text = (
    '| file | tests | seconds | processor seconds | imports of processes | '
    'compiling | running | waiting |\n|---|---|---|---|---|---|---|---|\n'
  )
  rest: dict[str, float] = collections.Counter()
  total: dict[str, float] = collections.Counter()
  for i, (name, sums) in enumerate(found.items()):
    for key, value in sums.items():
      total[key] += value
      if i >= LONGEST:
        rest[key] += value
    if i < LONGEST:
      text += row(f'`{name.removeprefix("tests/")}`', sums)
  if rest:
    text += row(f'the other {len(found) - LONGEST} files', rest)
  return text + row('all', total)


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m tests.timing')
  parser.add_argument('--read', type=pathlib.Path)
  folder = parser.parse_args().read
  if folder is None:
    folder = pathlib.Path(tempfile.mkdtemp(prefix='timings'))
    measure(folder)
  found = read(folder)
  with FILE.open('w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(['file', 'seconds'])
    writer.writerows(
      [name, f'{sums["wall"]:.1f}'] for name, sums in found.items()
    )
  before, _, rest = PAGE.read_text().partition(START)
  _, _, after = rest.partition(END)
  PAGE.write_text(before + START + table(found) + END + after)


if __name__ == '__main__':
  main()
