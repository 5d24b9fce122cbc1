"""Results of mutations as a markdown table."""

from collections.abc import Mapping, Sequence

from tests.mutations.cases import Mutation


def table(
  mutations: Sequence[Mutation], runs: Mapping[str, Mapping[str, dict]]
) -> str:
  """Returns a row for each mutation, with what caught it in each of the runs.

  Args:
    mutations: the rows.
    runs: results by mutation, by the heading of the run, such as 'before'.
  """
  rows = [['mutation', 'file', 'origin']]
  for heading in runs:
    rows[0] += [heading, 'tier', 's']
  rows.append(['---'] * len(rows[0]))
  for m in mutations:
    row = [m.name, m.file, m.origin]
    for results in runs.values():
      row += _cells(results.get(m.name))
    rows.append(row)
  lines = [f'| {" | ".join(row)} |' for row in rows]
  return '\n'.join([*lines, '', *map(_summary, runs, runs.values())])


def _cells(result: dict | None) -> list[str]:
  if result is None:
    return ['', '', '']
  if result['caught'] is None:
    where = {'nearest': 'the nearest tests', 'folder': 'its folder'}
    said = where.get(result['stage'], 'all tests')
    said = result['how'] or f'missed by {said}'
    return [said.replace('|', '\\|'), '', f'{result["seconds"]:.0f}']
  test = result['caught'].removeprefix('tests/').replace('|', '\\|')
  ended = {'hangs': ' (hangs)', 'memory': ' (takes all memory)'}
  how = ended.get(result['how'], '')
  return [f'`{test}`{how}', result['tier'], f'{result["seconds"]:.0f}']


def _summary(heading: str, results: Mapping[str, dict]) -> str:
  caught = [r for r in results.values() if r['caught'] is not None]
  tiers: dict[str, int] = {}
  for r in caught:
    tiers[r['tier']] = tiers.get(r['tier'], 0) + 1
  by_tier = ', '.join(f'{n} by {tier}' for tier, n in tiers.items())
  return (
    f'{heading}: {len(caught)} of {len(results)} caught'
    + (f' ({by_tier})' if by_tier else '')
    + '  '
  )
