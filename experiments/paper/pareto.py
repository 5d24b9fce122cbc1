r"""Figures 1, 5, 12 and 13: loss recovered against L0, both arms, at every site.

  python -m experiments.paper.pareto --config=experiments/paper/embedded.py --workdir=DIR

With --overlay=Pythia-2.8B:resid_post.16 the paper's own rows of that site stand
beside ours at sites of the same kind.
"""

import dataclasses
import math
from collections.abc import Sequence

from experiments.paper import fragments, study, tables
from experiments.paper.runs import Run
from gsae_jax.errors import UserError
from gsae_jax.evaluation import figures, page, pareto, series
from gsae_jax.evaluation.frontiers import Comparison
from gsae_jax.evaluation.pareto import Record

_COLUMNS = (
  'site',
  'L0 ratio at equal loss recovered',
  'share of it below 1',
  'gain in loss recovered at equal L0',
)


def comparisons(arms: Run) -> dict[str, Comparison | None]:
  """Gated against baseline, by site; None where they share no range."""
  return {
    site: pareto.compare(
      arms.at(site, 'gated', 'relu'), 'gated', 'relu', arms.resampled
    )
    for site in arms.sites
  }


def overlaid(name: str | None, sites: Sequence[str]) -> list[Record]:
  """The paper's rows for --overlay.

  Raises:
    UserError: there are no such rows, or no site of that kind here.
  """
  if name is None:
    return []
  model, _, site = name.partition(':')
  rows = []
  if model in tables.MODELS:
    rows = [r for r in tables.records(model) if r['site'] == site]
  if not rows:
    raise UserError(
      f'--overlay: no table has {name!r}; it is MODEL:SITE, with MODEL of '
      f'{", ".join(tables.MODELS)} and SITE such as resid_post.20'
    )
  if not any(_kind(s) == _kind(site) for s in sites):
    raise UserError(
      f'--overlay: {name!r} is of {_kind(site)}, and here are '
      f'{", ".join(sites)}'
    )
  return [
    r | {'variant': f'of the paper, {model} {site}', 'seed': 0, 'member': name}
    for r in rows
    if r['l0'] is not None
  ]


def _kind(site: str) -> str:
  return site.partition('.')[0]


def fragment(arms: Run, overlay: Sequence[Record] = ()) -> str:
  found = comparisons(arms)
  rows = [
    [
      site,
      fragments.shown(c and c.l0_ratio),
      fragments.shown(c and c.share),
      fragments.shown(c and c.gap),
    ]
    for site, c in found.items()
  ]
  parts = [fragments.table(_COLUMNS, rows)]
  for site, comparison in found.items():
    records = arms.at(site, 'gated', 'relu')
    beside = [r for r in overlay if _kind(r['site']) == _kind(site)]
    parts.append(_figures(site, records, beside, arms, comparison))
  return fragments.section(
    'Loss recovered against L0 (Figures 1, 5, 12, 13)',
    'Every SAE of every seed, each arm’s frontier, and where that lies in 95 % of '
    'resamplings of documents and seeds. Ratios and gains are of Gated against '
    'the baseline, with 95 % intervals.',
    *parts,
  )


def _figures(
  site: str,
  records: list[Record],
  beside: list[Record],
  arms: Run,
  comparison: Comparison | None,
) -> str:
  drawn = series.of_frontiers(records, arms.resampled)
  for s in series.of_frontiers(beside):
    drawn.append(dataclasses.replace(s, dashed=True, opacity=0.6))
  frames = [
    page.frame(
      f'{site}: loss recovered',
      'Up and to the left is better.',
      figures.figure(
        drawn,
        x_label='L0, features active per token (log)',
        y_label='loss recovered',
        title=f'Loss recovered against L0 at {site}',
        log_x=True,
      ),
    )
  ]
  if _kind(site).startswith('resid'):
    frames.append(
      page.frame(
        f'{site}: loss not recovered',
        'One minus loss recovered, logarithmic: zeros in the residual stream '
        'destroy the model, so all SAEs recover nearly everything. Down and to '
        'the left is better.',
        figures.figure(
          [_unrecovered(s) for s in drawn],
          x_label='L0, features active per token (log)',
          y_label='1 − loss recovered (log)',
          title=f'Loss not recovered against L0 at {site}',
          log_x=True,
          log_y=True,
        ),
      )
    )
  if comparison is not None:
    frames.append(
      page.frame(
        f'{site}: L0 ratio',
        'L0 of Gated over that of the baseline at each level of loss recovered '
        'that both reach; 0.5 is half the firing features.',
        figures.figure(
          [_ratios(comparison)],
          x_label='loss recovered',
          y_label='L0 ratio',
          title=f'L0 ratio against loss recovered at {site}',
          guide=1.0,
        ),
      )
    )
  return fragments.side_by_side(*frames)


def _unrecovered(s: figures.Series) -> figures.Series:
  return dataclasses.replace(
    s,
    points=[(x, 1 - y, text) for x, y, text in s.points],
    band=[(x, 1 - high, 1 - low) for x, low, high in s.band],
  )


def _ratios(comparison: Comparison) -> figures.Series:
  at = list(zip(comparison.levels, comparison.ratios, strict=True))
  return figures.Series(
    'Gated / baseline',
    'gated',
    [(x, e.value, f'{x:.4f}: {e}') for x, e in at if math.isfinite(e.value)],
    band=[(x, *e.interval) for x, e in at if e.interval],
  )


def make(s: study.Study) -> str:
  overlay = overlaid(s.overlay, list(s.pairs))
  return fragment(s.results('arms'), overlay)


if __name__ == '__main__':
  study.draw('pareto', make)
