r"""Tables 1 to 8: every SAE of the study, as HTML and as results.csv.

python -m experiments.paper.results --config=experiments/paper/embedded.py --workdir=DIR
"""

import csv
import io
from collections.abc import Sequence
from typing import Any

from experiments.paper import fragments, study
from experiments.paper.runs import Run
from gsae_jax import paths
from gsae_jax.evaluation import pareto
from gsae_jax.evaluation.pareto import Record

_INTERVALS = ('l0', 'loss_recovered', 'ce_spliced', 'gamma')
_OF_RECORD = (
  'member', 'site', 'architecture', 'variant', 'features', 'l1_coefficient',
  'seed', 'step', 'tokens_trained', 'l0', 'loss_recovered', 'ce_clean',
  'ce_spliced', 'ce_zero_ablation', 'alive_fraction', 'gamma',
)  # fmt: skip
# The columns of the paper's tables.
_HEAD = (
  'SAE', 'site', 'λ', 'LR', 'L0', '% CE recovered', 'clean CE', 'SAE CE',
  '0-abl CE', 'width', '% alive', 'γ',
)  # fmt: skip


def csv_text(run: Run) -> str:
  """All digits of every record, its learning rate, and 95 % intervals."""
  bounds = [f'{name}_{end}' for name in _INTERVALS for end in ('low', 'high')]
  out = io.StringIO()
  fields = [*_OF_RECORD, 'learning_rate', *bounds]
  writer = csv.DictWriter(out, fields, lineterminator='\n')
  writer.writeheader()
  for r in run.last:
    row: dict[str, Any] = {name: r[name] for name in _OF_RECORD}
    row['learning_rate'] = run.rates[r['member']]
    for name in _INTERVALS:
      low, high = r['intervals'][name] or (None, None)
      row |= {f'{name}_low': low, f'{name}_high': high}
    writer.writerow(row)
  return out.getvalue()


def fragment(run: Run) -> str:
  return fragments.section(
    'Every SAE (Tables 1 to 8)',
    'The columns of the paper’s tables; results.csv has all digits, and 95 % '
    'intervals over documents.',
    fragments.table(_HEAD, [_cells(run, r) for r in _ordered(run.last)]),
  )


def _ordered(records: Sequence[Record]) -> list[Record]:
  return sorted(
    records, key=lambda r: (r['site'], pareto.kind(r), r['l0'], r['seed'])
  )


def _cells(run: Run, r: Record) -> list[str]:
  number = lambda value, form: '–' if value is None else form.format(value)
  recovered = r['loss_recovered']
  return [
    r['member'],
    r['site'],
    f'{r["l1_coefficient"]:g}',
    f'{run.rates[r["member"]]:g}',
    f'{r["l0"]:.1f}',
    number(recovered and 100 * recovered, '{:.2f}%'),
    f'{r["ce_clean"]:.4f}',
    f'{r["ce_spliced"]:.4f}',
    f'{r["ce_zero_ablation"]:.4f}',
    str(r['features']),
    f'{100 * r["alive_fraction"]:.2f}%',
    number(r['gamma'], '{:.3f}'),
  ]


def write(s: study.Study, run: Run) -> None:
  paths.write_whole(s.workdir / 'results.csv', csv_text(run))


def make(s: study.Study) -> str:
  run = s.results(*study.PARTS)
  write(s, run)
  return fragment(run)


if __name__ == '__main__':
  study.draw('results', make)
