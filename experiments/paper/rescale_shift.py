r"""Figure 9: a baseline whose magnitudes are learned anew (5.2), at one site.

  python -m experiments.paper.rescale_shift --config=experiments/paper/embedded.py --workdir=DIR

The baseline has the width of Gated here; rescale & shift is trained on top of each
of its SAEs, and keeps its directions and what fires.
"""

from experiments.paper import arms as arms_lib
from experiments.paper import fragments, study
from experiments.paper.runs import Run
from gsae_jax.evaluation import figures, frontiers, page, series
from gsae_jax.evaluation.frontiers import Comparison
from gsae_jax.evaluation.pareto import Record

GAIN = 'rescale & shift over its baseline'
GAP = 'Gated over rescale & shift'
_PAIRS = {
  GAIN: (arms_lib.RESCALE_SHIFT, arms_lib.EQUAL_WIDTH),
  GAP: ('gated', arms_lib.RESCALE_SHIFT),
  'Gated over the baseline of equal width': ('gated', arms_lib.EQUAL_WIDTH),
}


def gated_of(everything: Run, site: str) -> list[Record]:
  """Gated's SAEs with as many coefficients as the baselines have."""
  gated = everything.at(site, 'gated')
  l1 = sorted({r['l1_coefficient'] for r in gated})
  count = {
    r['l1_coefficient'] for r in everything.at(site, arms_lib.EQUAL_WIDTH)
  }
  few = arms_lib.some(l1, len(count))
  return [r for r in gated if r['l1_coefficient'] in few]


def comparisons(everything: Run, site: str) -> dict[str, Comparison | None]:
  """By title: `GAIN`, `GAP`, and Gated over the baseline.

  Args:
    everything: results of the benchmark, the ablations and the shift together.
    site: of the latter two.
  """
  records = {
    name: gated_of(everything, site)
    if name == 'gated'
    else everything.at(site, name)
    for name in ('gated', arms_lib.EQUAL_WIDTH, arms_lib.RESCALE_SHIFT)
  }
  return {
    title: frontiers.compare(records[a], records[b], everything.resampled)
    for title, (a, b) in _PAIRS.items()
  }


def fragment(everything: Run, site: str) -> str:
  narrow = everything.at(site, arms_lib.EQUAL_WIDTH)
  records = [
    *gated_of(everything, site),
    *(r | {'variant': 'equal width'} for r in narrow),
    *everything.at(site, arms_lib.RESCALE_SHIFT),
  ]
  rows = [
    [title, fragments.shown(c and c.l0_ratio), fragments.shown(c and c.gap)]
    for title, c in comparisons(everything, site).items()
  ]
  l0 = 'L0, features active per token (log)'
  return fragments.section(
    'Rescale & shift (Figure 9)',
    f'Is Gated more than a baseline without shrinkage? At {site}, equal widths.',
    fragments.table(
      (
        '',
        'L0 ratio at equal loss recovered',
        'difference in loss recovered at equal L0',
      ),
      rows,
    ),
    fragments.side_by_side(
      page.frame(
        f'{site}: frontiers',
        'Up and to the left is better. Bands: 95 % of resamplings.',
        figures.figure(
          series.of_frontiers(records, everything.resampled),
          x_label=l0,
          y_label='loss recovered',
          title=f'Rescale and shift at {site}',
          log_x=True,
        ),
      ),
      page.frame(
        f'{site}: γ',
        'One line per seed. Rescale & shift should bring it to 1.',
        figures.figure(
          series.by_kind(records, 'gamma'),
          x_label=l0,
          y_label='γ',
          title=f'gamma of rescale and shift at {site}',
          log_x=True,
          guide=1.0,
        ),
      ),
    ),
  )


def make(s: study.Study) -> str:
  everything = s.results('arms', 'ablations', 'shift')
  return fragment(everything, s.ablation_site)


if __name__ == '__main__':
  study.draw('rescale_shift', make)
