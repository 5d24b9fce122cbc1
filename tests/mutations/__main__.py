r"""Checks that tests notice small mutations of the code.

  python -m tests.mutations --out=results.jsonl
  python -m tests.mutations --out=results.jsonl --only 001_aux_decoder_gradient
  python -m tests.mutations --table before=before.jsonl after=after.jsonl

Each mutation is applied to a copy of the tree, and tests are run until one fails.
First, for all mutations, the test file of the same name, or those that import the
module; for those that are missed, the rest of the folder that mirrors the package;
and for ten of those that are still missed, drawn by a hash of their names, all
other tests. Results are appended to --out, and what
is there is not run again. Tests compile into the folder that
JAX_COMPILATION_CACHE_DIR names, if the tree's tests do not choose their own.
"""

import argparse
import concurrent.futures
import pathlib
import queue
import tempfile

from tests.mutations.cases import read_mutations
from tests.mutations.runner import (
  Settings,
  append_result,
  copy_tree,
  read_results,
  run_mutation,
  still_to_run,
)
from tests.mutations.table import table

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

# What `make test-fast` runs, and what `make test` and `make test-all` run beside it.
TIERS = {
  'test-fast': 'not integration and not slow and not campaign',
  'test': 'integration and not slow and not campaign',
  'test-all': 'slow and not campaign',
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='tests.mutations', description=__doc__.splitlines()[0]
  )
  pair = lambda text: text.split('=', 1)
  parser.add_argument('--tree', type=pathlib.Path, default=ROOT)
  parser.add_argument('--commit', help='Copy it, not the files as they are.')
  parser.add_argument('--out', type=pathlib.Path, default='results.jsonl')
  parser.add_argument('--jobs', type=int, default=1)
  parser.add_argument('--only', nargs='+', metavar='NAME')
  parser.add_argument(
    '--tier', type=pair, action='append', metavar='NAME=MARKS',
    help='Tests to run, in this order; the default is those of make test-fast, '
    'make test and make test-all.',
  )  # fmt: skip
  parser.add_argument(
    '--deselect', action='append', default=[], metavar='TEST',
    help='A test that fails without a mutation.',
  )  # fmt: skip
  parser.add_argument(
    '--limit', type=float, default=600.0, help='Seconds that a test may take.'
  )
  parser.add_argument(
    '--memory', type=float, default=8.0, help='GB that the tests may take.'
  )
  parser.add_argument(
    '--whole', type=int, default=10,
    help='How many of those that their folder misses meet all other tests.',
  )  # fmt: skip
  parser.add_argument(
    '--table', type=pair, nargs='+', metavar='HEADING=FILE',
    help='Print results as a markdown table; run nothing.',
  )  # fmt: skip
  given = parser.parse_args(argv)
  given.tier = dict(given.tier or TIERS.items())
  return given


def main(given: argparse.Namespace) -> None:
  mutations = read_mutations()
  if given.table:
    runs = {h: read_results(pathlib.Path(f)) for h, f in given.table}
    print(table(mutations, runs))
    return
  if given.only:
    unknown = set(given.only) - {m.name for m in mutations}
    if unknown:
      raise SystemExit(f'error: no mutation {min(unknown)}; see {ROOT}')
    mutations = [m for m in mutations if m.name in given.only]
  settings = Settings(
    given.tier, given.limit, given.memory * 1e9, tuple(given.deselect)
  )
  with tempfile.TemporaryDirectory(prefix='mutations-') as folder:
    copies: queue.SimpleQueue = queue.SimpleQueue()
    for i in range(given.jobs):
      place = pathlib.Path(folder) / str(i)
      place.mkdir()
      copies.put(copy_tree(given.tree.resolve(), given.commit, place))

    def run(mutation, stage, before):
      copy = copies.get()
      try:
        found = run_mutation(copy, mutation, settings, stage, before)
      finally:
        copies.put(copy)
      append_result(given.out, found)
      said = found['caught'] or found['how'] or f'missed by the {stage}'
      print(f'{mutation.name}: {said} ({found["seconds"]:.0f} s)', flush=True)

    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
      for stage in ('nearest', 'folder', 'tree'):
        results = read_results(given.out)
        left = still_to_run(mutations, results, stage, given.whole)
        seconds = [results.get(m.name, {}).get('seconds', 0.0) for m in left]
        list(pool.map(run, left, [stage] * len(left), seconds))


if __name__ == '__main__':
  main(parse())
