"""Frontiers of evaluation records, and how two architectures compare on them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Record = dict[str, Any]

# A ratio that moved by less over the second half of training has settled.
SETTLED = 0.05

COLUMNS = (
  ('member', 'SAE', '{}'),
  ('site', 'site', '{}'),
  ('features', 'features', '{}'),
  ('l1_coefficient', 'L1', '{:g}'),
  ('tokens_trained', 'tokens', '{:.3g}'),
  ('l0', 'L0', '{:.1f}'),
  ('loss_recovered', 'loss recovered', '{:.4f}'),
  ('gamma', 'gamma', '{:.3f}'),
  ('explained_variance', 'expl. variance', '{:.4f}'),
  ('kl_clean_spliced', 'KL', '{:.4f}'),
  ('ce_spliced', 'CE spliced', '{:.4f}'),
  ('alive_fraction', 'alive', '{:.3f}'),
)


def kind(record: Record) -> str:
  """The architecture, with what differs from the paper's."""
  return ', '.join(filter(None, (record['architecture'], record['variant'])))


def cells(record: Record) -> list[str]:
  """The record's values as the table shows them."""
  return [
    '–' if record[key] is None else form.format(record[key])
    for key, _, form in COLUMNS
  ]


def ordered(records: Sequence[Record]) -> list[Record]:
  """By site, then kind, then rising L0."""
  return sorted(records, key=lambda r: (r['site'], kind(r), r['l0']))


def table(records: Sequence[Record]) -> str:
  """A text table of the records."""
  rows = [[name for _, name, _ in COLUMNS]]
  rows += [cells(r) for r in ordered(records)]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    '  '.join(v.rjust(w) for v, w in zip(row, widths, strict=True))
    for row in rows
  )


def frontier(records: Sequence[Record]) -> list[Record]:
  """The records that none of the others beats in both L0 and loss recovered."""
  best = -math.inf
  kept = []
  drawn = [r for r in records if r['l0'] and r['loss_recovered'] is not None]
  for r in sorted(drawn, key=lambda r: (r['l0'], -r['loss_recovered'])):
    if r['loss_recovered'] > best:
      best = r['loss_recovered']
      kept.append(r)
  return kept


def l0_ratio(
  records: Sequence[Record], architecture: str, baseline: str
) -> float | None:
  """How many features fire, against the baseline at equal loss recovered.

  Both frontiers are interpolated linearly in log L0 over the loss recovered
  that both reach; the ratio is the geometric mean over that range.

  Returns:
    L0 of `architecture` over L0 of `baseline`, or None where the frontiers
    share no range.
  """
  curves = []
  for name in (architecture, baseline):
    points = frontier([r for r in records if kind(r) == name])
    if len(points) < 2:
      return None
    curves.append(
      (
        np.array([p['loss_recovered'] for p in points]),
        np.log([p['l0'] for p in points]),
      )
    )
  low = max(recovered[0] for recovered, _ in curves)
  high = min(recovered[-1] for recovered, _ in curves)
  if low >= high:
    return None
  at = np.linspace(low, high, 101)
  ours, theirs = (np.interp(at, recovered, l0) for recovered, l0 in curves)
  return float(np.exp(np.mean(ours - theirs)))


def ratio_history(
  evaluations: Mapping[int, Sequence[Record]], site: str
) -> list[tuple[int, float]]:
  """Activations seen and L0 ratio, Gated over baseline, by checkpoint."""
  history = []
  for _, records in sorted(evaluations.items()):
    own = [r for r in records if r['site'] == site]
    ratio = l0_ratio(own, 'gated', 'relu')
    if ratio is not None:
      history.append((own[0]['tokens_trained'], ratio))
  return history


def settled(history: Sequence[tuple[int, float]]) -> bool:
  """Whether the ratio is what it was at half of the activations seen.

  The last two checkpoints would not do: at the end of a run the learning rate
  has decayed, and nothing moves any more.
  """
  tokens, ratio = history[-1]
  before = [r for t, r in history if t <= tokens / 2]
  return bool(before) and abs(ratio / before[-1] - 1) < SETTLED


def summary(evaluations: Mapping[int, Sequence[Record]]) -> str:
  """The latest checkpoint's table, and each site's L0 ratio below it."""
  last = evaluations[max(evaluations)]
  lines = [table(last)]
  for site in sorted({r['site'] for r in last}):
    history = ratio_history(evaluations, site)
    if history:
      tokens, ratio = history[-1]
      state = 'settled' if settled(history) else 'not converged'
      lines.append(
        f'{site}: L0 of Gated over baseline at equal loss recovered is '
        f'{ratio:.3f} after {tokens:,} activations each ({state})'
      )
  return '\n'.join(lines)
