r"""The L0 ratio against activations seen: has the comparison settled?

  python -m experiments.paper.history --config=experiments/paper/embedded.py --workdir=DIR

The paper trains each SAE for 1.2 to 1.6 * 10^9 activations. The baseline converges
more slowly, so that a short study flatters Gated.
"""

from experiments.paper import fragments, study
from experiments.paper.runs import Run
from gsae_jax.evaluation import figures, page, pareto, series


def histories(arms: Run) -> dict[str, list[pareto.Seen]]:
  """By site."""
  return {
    site: pareto.ratio_history(arms.evaluations, site, arms.replicates)
    for site in arms.sites
  }


def fragment(arms: Run) -> str:
  frames, rows = [], []
  for site, history in histories(arms).items():
    for seen in history:
      rows.append([site, f'{seen.tokens:,}', str(seen.ratio)])
    if history:
      state = 'settled' if pareto.settled(history) else 'not converged'
      frames.append(
        page.frame(
          f'{site}: {state}',
          f'Settled is within {pareto.SETTLED:.0%} of the ratio at half the '
          'activations.',
          figures.figure(
            [series.of_history(history)],
            x_label='activations seen by each SAE',
            y_label='L0 ratio',
            title=f'L0 ratio over training at {site}',
            guide=1.0,
          ),
        )
      )
  return fragments.section(
    'The L0 ratio over training',
    'L0 of Gated over baseline at equal loss recovered, by checkpoint, with 95 % '
    'intervals. A checkpoint where the frontiers share no range is left out.',
    fragments.side_by_side(*frames),
    fragments.table(('site', 'activations', 'L0 ratio'), rows),
  )


def make(s: study.Study) -> str:
  return fragment(s.results('arms'))


if __name__ == '__main__':
  study.draw('history', make)
