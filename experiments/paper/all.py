r"""Every figure, table and claim of the paper, on the model of any config.

  python -m experiments.paper.all --config=experiments/paper/embedded.py --workdir=DIR

Runs what study.py and ito.py run, unless it is there, writes DIR/index.html with
the claims first, claims.json and results.csv, and prints the claims.
"""

import html

from experiments.paper import (
  ablations,
  claims,
  fragments,
  history,
  ito,
  pareto,
  rescale_shift,
  results,
  shrinkage,
  study,
  toy,
)
from experiments.paper.runs import Run
from gsae_jax import paths
from gsae_jax.evaluation import page


def body(s: study.Study, found: claims.Findings) -> str:
  """The page's HTML."""
  judged = claims.judged(found)
  claims.write(s, judged)
  overlay = pareto.overlaid(s.overlay, list(s.pairs))
  return ''.join(
    [
      claims.fragment(judged),
      pareto.fragment(found.arms, overlay),
      shrinkage.fragment(found.arms),
      history.fragment(found.arms),
      ablations.fragment(found.everything, found.site),
      rescale_shift.fragment(found.everything, found.site),
      ito.fragment(found.ito),
      fragments.section(
        'Toy model (Figure 15)',
        'A feature that is there or not, and the best that a ReLU and a JumpReLU '
        'can do (Appendix F).',
        toy.figure(),
      ),
      results.fragment(found.everything),
    ]
  )


def _worth(arms: Run) -> str:
  """How many documents of equal length would tell as much."""
  n = next(iter(arms.documents[max(arms.evaluations)].sums.values()))['tokens']
  if len(n) < 2:
    return (
      ' (of one, there are no intervals and few verdicts: raise eval.tokens)'
    )
  return f' (as good as {n.sum() ** 2 / (n**2).sum():.0f} of equal length)'


def main(s: study.Study) -> None:
  found = claims.findings(s)
  results.write(s, found.everything)
  last = found.arms.last[0]
  title = f'Gated sparse autoencoders: {s.title}'
  lead = (
    f'{len(found.everything.last)} SAEs after {last["tokens_trained"]:,} '
    f'activations each, {s.coefficients} coefficients by {s.seeds} seeds an arm; '
    f'evaluated on {last["num_tokens"]:,} tokens of {last["num_documents"]:,} '
    f'held-out documents{_worth(found.arms)}; clean cross-entropy {last["ce_clean"]:.4f} nats per '
    'prediction. After arXiv 2404.16014.'
  )
  head = f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>'
  path = s.workdir / 'index.html'
  paths.write_whole(path, page.document(title, head + body(s, found)))
  print(path)


COMMAND = study.command(main)

if __name__ == '__main__':
  COMMAND.run()
