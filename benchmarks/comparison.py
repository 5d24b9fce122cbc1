"""Sides that took turns, as rows of a record and as a table."""

from typing import Any

from benchmarks import record
from benchmarks.products import PRODUCTS

_OWN = {'turns', 'wall', 'flops', 'peak_bytes', 'versions'}

Rows = list[dict[str, Any]]


def _ratio(theirs: list[float], ours: list[float]) -> dict[str, Any]:
  """How many times as many tokens per second, by rounds."""
  pairs = zip(theirs, ours, strict=True)
  return record.spread((b / a for a, b in pairs), 'times')


def make_rows(
  found: dict[str, dict[str, Any]],
  *,
  tokens: int,
  times: int = 1,
  unit: float | None = None,
) -> Rows:
  """A row a side, in milliseconds, tokens, operations and bytes.

  Args:
    found: what `turns.measure` gives; 'matmul' is the machine's peak.
    tokens: of one step, of sides that do not say so.
    times: steps of a turn.
    unit: operations of one unit of work, if there is one.

  Returns:
    rows; with what else a side said, as it said it.
  """
  speeds = {
    name: [side.get('tokens', tokens) * times / t for t in side['turns']]
    for name, side in found.items()
    if name != PRODUCTS
  }
  peak = None
  if PRODUCTS in found:
    peak = _rate(found[PRODUCTS], times)
  rows = []
  for name, side in found.items():
    ms = lambda clock: record.spread(
      (1e3 * t / times for t in side[clock]),  # noqa: B023
      'ms',
    )
    row = {
      'name': name,
      'step': ms('turns'),
      'wall': ms('wall'),
      'peak_memory': {'value': side['peak_bytes'] / 2**20, 'unit': 'MiB'},
    }
    if side.get('flops'):
      row['rate'] = _rate(side, times)
      if unit:
        row['units'] = side['flops'] / unit
      if peak:
        row['share_of_peak'] = row['rate']['median'] / peak['median']
    if name in speeds:
      row['speed'] = record.spread(speeds[name], 'tokens/s')
      row['times_as_fast_as'] = {
        other: _ratio(speed, speeds[name]) for other, speed in speeds.items()
      }
    rows.append(row | {k: v for k, v in side.items() if k not in _OWN})
  return rows


def accelerators(rows: Rows) -> dict[str, str]:
  """What to say of the hardware beside its processor."""
  names = {row['device'] for row in rows if 'device' in row} - {'cpu'}
  return {'accelerator': ', '.join(sorted(names))} if names else {}


def _rate(side: dict[str, Any], times: int) -> dict[str, Any]:
  work = side['flops'] * times / 1e9
  return record.spread((work / t for t in side['turns']), 'GFLOP/s')


def warn(others_busy: float | None) -> None:
  """Says that figures are not to be quoted, if so."""
  if others_busy is not None and others_busy > 0.1:
    print(
      f'\nOther cores were busy {others_busy:.0%} of the time: measure again on a '
      'quiet machine before quoting this.'
    )


def table(
  rows: Rows, bases: list[str], more: dict[str, tuple[str, str]] | None = None
) -> str:
  """Markdown.

  Args:
    rows: of `make_rows`.
    bases: sides that the others are compared with.
    more: further columns: heading, and format, by field.
  """
  more = more or {}
  heads = ['', 'units', 'ms', 'tokens/s', *(f'x {name}' for name in bases)]
  heads += [
    'GFLOP/s',
    'of peak',
    'peak MiB',
    *(head for head, _ in more.values()),
  ]
  if not any('units' in row for row in rows):
    heads.remove('units')

  def cells(row):
    number = lambda key, form: format(row[key], form) if key in row else ''
    ratios = row.get('times_as_fast_as', {})
    units = [number('units', '.2f')] if 'units' in heads else []
    return [
      row['name'],
      *units,
      record.show(row['step'], ',.1f'),
      record.show(row.get('speed'), ',.0f'),
      *(record.show(ratios.get(base), '.2f') for base in bases),
      record.show(row.get('rate'), ',.1f'),
      number('share_of_peak', '.0%'),
      format(row['peak_memory']['value'], ',.0f'),
      *(number(key, form) for key, (_, form) in more.items()),
    ]

  return record.table(heads, (cells(row) for row in rows))
