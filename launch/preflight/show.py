"""What was found, in words and tables."""

from collections.abc import Iterable
from typing import Any

from launch.preflight.meshes import Estimate
from launch.preflight.roofline import GB, GIB
from launch.preflight.topology import Machine

MB, MS = 1e6, 1e-3
_MESHES = 5  # Of a ranking.

HEADS = (
  'program', 'runs', 'TFLOP', 'moved, GB', 'collectives, MB that come out',
  'arguments, GiB', 'temporary', 'code', 'peak', 'compute, ms', 'HBM, ms',
  'ICI, ms',
)  # fmt: skip
_BOUNDS = {
  'compute': 'compute',
  'memory': 'HBM bandwidth',
  'network': 'ICI bandwidth',
}


def line(cells: Iterable[str]) -> str:
  """A row of a table."""
  return f'| {" | ".join(cells)} |'


def cells(row: dict[str, Any]) -> list[str]:
  """A program; what bounds it is bold."""
  first = [row['program'], f'{row["runs"]:.4g}']
  if 'does_not_fit' in row:
    needs = '**needs {needs} of {has}**'.format(**row['does_not_fit'])
    return [*first, *[''] * 6, needs, *[''] * 3]
  sent = ', '.join(
    f'{c["count"]} {c["kind"]} over {c["axis"]} {number(c["bytes"] / MB)}'
    for c in row['collectives']
  )
  seconds = row['seconds']
  bound = max(seconds, key=seconds.get)
  mark = lambda name: '**' if name == bound else ''
  return [
    *first,
    f'{row["flops_per_chip"] / 1e12:.3g}',
    f'{row["memory_bytes"] / GB:.3g}',
    sent or 'nothing',
    *(
      f'{row["held"][k] / GIB:.2f}'
      for k in ('arguments', 'temporary', 'code', 'peak')
    ),
    *(f'{mark(k)}{t / MS:.3g}{mark(k)}' for k, t in seconds.items()),
  ]


def number(value: float) -> str:
  return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def between(values: list[float]) -> str:
  low, high = map(number, sorted(values))
  return low if low == high else f'{low} to {high}'


def summary(
  total: dict[str, Any], machine: Machine, price: float | None
) -> list[str]:
  """A part, in lines.

  Args:
    total: of `parts.total`.
    machine: on what.
    price: dollars of a chip for an hour; None where nobody said.
  """
  needs, usable = total['needs'] / GIB, total['usable'] / GIB
  fits = 'fits' if total['fits'] else 'DOES NOT FIT'
  lines = [f'{total["part"]}: {needs:.2f} of {usable:.2f} GiB a chip, {fits}']
  if 'hours' not in total:
    return lines
  per_second = between([r / 1e3 for r in total['tokens_per_second']])
  what = {
    'harvest': 'of the store',
    'train': 'of the run',
    'evaluate': 'of a checkpoint',
  }[total['part']]
  lines.append(
    f'  bound by {_BOUNDS[total["bound"]]}; {per_second} thousand tokens/s; '
    f'{between(total["hours"])} h for the {total["tokens"]:,} tokens {what}'
  )
  if total['storage'][1]:
    verb = 'writes' if total['part'] == 'harvest' else 'must read'
    rate = between([s / MB for s in total['storage']])
    lines.append(f'  storage: {verb} {rate} MB/s')
  if price is not None:
    dollars = [h * machine.chips * price for h in total['hours']]
    billion = [d / total['tokens'] * 1e9 for d in dollars]
    lines.append(
      f'  cost: {between(dollars)} dollars {what}, '
      f'{between(billion)} for a billion tokens'
    )
  return lines


def ranking(
  estimates: list[Estimate],
  compiled: dict[tuple[int, int, int], dict[str, Any]],
  mine: tuple[int, int, int],
  machine: Machine,
) -> list[str]:
  """Meshes, the best first, with what the compiler says where it was asked.

  Args:
    estimates: of all meshes, the best first.
    compiled: totals of training by mesh.
    mine: the config's mesh.
    machine: the chips.
  """
  lines = [
    line(('mesh', 'ms a step', 'compiled', 'GiB a chip', 'compiled', '')),
    line(['---'] * 6),
  ]
  asked = {mine, *compiled}
  for i, e in enumerate(estimates):
    if i >= _MESHES and e.sizes not in asked:
      continue
    total = compiled.get(e.sizes, {})
    needs = total.get('needs', e.needs)
    notes = ["the config's"] if e.sizes == mine else []
    notes += ['does not fit'] if needs > machine.chip.usable else []
    hours = total.get('hours')
    lines.append(
      line(
        (
          str(e),
          number(e.seconds / MS),
          number(hours[0] / total['turns'] * 3600 / MS) if hours else '',
          f'{e.needs / GIB:.2f}',
          f'{needs / GIB:.2f}' if total else '',
          ', '.join(notes),
        )
      )
    )
  return lines
