r"""Figures 6 and 14: relative reconstruction bias, both arms, at every site.

python -m experiments.paper.shrinkage --config=experiments/paper/embedded.py --workdir=DIR
"""

from experiments.paper import fragments, study
from experiments.paper.runs import Run
from gsae_jax.evaluation import figures, page, series

_AXES = (
  ('l0', 'L0, features active per token (log)'),
  ('l1_coefficient', 'L1 coefficient (log)'),
)


def fragment(arms: Run) -> str:
  frames = []
  for site in arms.sites:
    records = arms.at(site, 'gated', 'relu')
    for x, label in _AXES:
      frames.append(
        page.frame(
          f'{site}: γ against {label.removesuffix(" (log)")}',
          'One line per seed. Below 1, reconstructions are too small.',
          figures.figure(
            series.by_kind(records, 'gamma', x),
            x_label=label,
            y_label='γ',
            title=f'gamma against {x} at {site}',
            log_x=True,
            guide=1.0,
          ),
        )
      )
  return fragments.section(
    'Shrinkage (Figures 6, 14)',
    'Relative reconstruction bias γ = E||x̂||² / E[x̂·x] (Eq. 9, 10): 1 is none.',
    fragments.side_by_side(*frames),
  )


def make(s: study.Study) -> str:
  return fragment(s.results('arms'))


if __name__ == '__main__':
  study.draw('shrinkage', make)
