r"""Figure 8: what of Gated matters (5.1), at one site.

  python -m experiments.paper.ablations --config=experiments/paper/embedded.py --workdir=DIR

Every variant has the same coefficients, seeds and learning rate; Gated's own SAEs
of these coefficients are the ones of the benchmark.
"""

from experiments.paper import arms as arms_lib
from experiments.paper import fragments, study
from experiments.paper.runs import Run
from gsae_jax.evaluation import figures, frontiers, page, series
from gsae_jax.evaluation.frontiers import Comparison
from gsae_jax.evaluation.pareto import Record

_TITLES = {
  'unfrozen': 'auxiliary decoder not frozen',
  'no_r_mag': 'no r_mag',
  'untied': 'untied encoders',
}


def gated_like(both: Run, site: str, other: str) -> list[Record]:
  """Gated's records at the coefficients that another kind has."""
  l1 = {r['l1_coefficient'] for r in both.at(site, other)}
  return [r for r in both.at(site, 'gated') if r['l1_coefficient'] in l1]


def comparisons(both: Run, site: str) -> dict[str, Comparison | None]:
  """L0 of every ablation over Gated's.

  Args:
    both: the benchmark's results and the ablations', together.
    site: of the ablations.
  """
  return {
    name: frontiers.compare(
      both.at(site, name), gated_like(both, site, name), both.resampled
    )
    for name in arms_lib.ABLATIONS
  }


def fragment(both: Run, site: str) -> str:
  first = next(iter(arms_lib.ABLATIONS))
  records = gated_like(both, site, first)
  records = records + both.at(site, *arms_lib.ABLATIONS)
  rows = [
    [
      _TITLES[name],
      fragments.shown(c and c.l0_ratio),
      fragments.shown(c and c.gap),
    ]
    for name, c in comparisons(both, site).items()
  ]
  return fragments.section(
    'Ablations (Figure 8)',
    f'Gated and what is left of it without one of its parts, at {site}.',
    fragments.table(
      (
        'variant',
        'L0 over Gated’s at equal loss recovered',
        'loss recovered less Gated’s, at equal L0',
      ),
      rows,
    ),
    fragments.side_by_side(
      page.frame(
        f'{site}: frontiers',
        'Up and to the left is better. Bands: 95 % of resamplings.',
        figures.figure(
          series.of_frontiers(records, both.resampled),
          x_label='L0, features active per token (log)',
          y_label='loss recovered',
          title=f'Ablations at {site}',
          log_x=True,
        ),
      )
    ),
  )


def make(s: study.Study) -> str:
  return fragment(s.results('arms', 'ablations'), s.ablation_site)


if __name__ == '__main__':
  study.draw('ablations', make)
