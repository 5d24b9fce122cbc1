"""Frontiers of evaluation records, and how two architectures compare on them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gsae_jax.evaluation import frontiers
from gsae_jax.evaluation.frontiers import Comparison, Estimate, Replicates

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
  values = [
    [np.nan if r[name] is None else r[name] for r in records]
    for name in ('l0', 'loss_recovered')
  ]
  l0_RM, recovered_RM = np.array(values)[:, None]
  order_RM, kept_RM = frontiers.best(l0_RM, recovered_RM, True)
  return [records[i] for i in order_RM[0][kept_RM[0]]]


def compare(
  records: Sequence[Record],
  architecture: str,
  baseline: str,
  resampled: Replicates | None = None,
) -> Comparison | None:
  """The frontiers of two kinds of one site, see `frontiers.compare`."""
  ours, theirs = (
    [r for r in records if kind(r) == name] for name in (architecture, baseline)
  )
  return frontiers.compare(ours, theirs, resampled)


@dataclasses.dataclass(frozen=True)
class Seen:
  """The L0 ratio, Gated over baseline, when each SAE had seen so much.

  Attributes:
    tokens: activations.
    ratio: with its interval, where the sums of documents are there.
  """

  tokens: int
  ratio: Estimate


def ratio_history(
  evaluations: Mapping[int, Sequence[Record]],
  site: str,
  documents: Mapping[int, Replicates] | None = None,
) -> list[Seen]:
  """By checkpoint.

  Args:
    evaluations: records by step.
    site: of the SAEs.
    documents: `frontiers.replicates` of the steps that have them.
  """
  history = []
  for step, records in sorted(evaluations.items()):
    own = [r for r in records if r['site'] == site]
    found = compare(own, 'gated', 'relu', (documents or {}).get(step))
    if found is not None:
      history.append(Seen(own[0]['tokens_trained'], found.l0_ratio))
  return history


def settled(history: Sequence[Seen]) -> bool:
  """Whether the ratio is what it was at half of the activations seen.

  The last two checkpoints would not do: at the end of a run the learning rate
  has decayed, and nothing moves any more.
  """
  last = history[-1]
  before = [h.ratio.value for h in history if h.tokens <= last.tokens / 2]
  return bool(before) and abs(last.ratio.value / before[-1] - 1) < SETTLED


def summary(
  evaluations: Mapping[int, Sequence[Record]],
  documents: Mapping[int, Replicates] | None = None,
) -> str:
  """The latest checkpoint's table, and each site's L0 ratio below it."""
  last = evaluations[max(evaluations)]
  lines = [table(last)]
  for site in sorted({r['site'] for r in last}):
    history = ratio_history(evaluations, site, documents)
    if history:
      state = 'settled' if settled(history) else 'not converged'
      lines.append(
        f'{site}: L0 of Gated over baseline at equal loss recovered is '
        f'{history[-1].ratio} after {history[-1].tokens:,} activations each '
        f'({state})'
      )
  return '\n'.join(lines)
