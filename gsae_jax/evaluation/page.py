"""The report: one HTML page made of evaluation records and training metrics."""

import html
import importlib.resources
from collections.abc import Mapping, Sequence

from gsae_jax.evaluation import figures, pareto, series
from gsae_jax.evaluation.frontiers import Replicates
from gsae_jax.evaluation.pareto import Record
from gsae_jax.evaluation.series import kinds, label_of


def render(
  title: str,
  evaluations: Mapping[int, Sequence[Record]],
  metrics: Sequence[dict],
  documents: Mapping[int, Replicates] | None = None,
) -> str:
  """The page.

  Args:
    title: the run's name.
    evaluations: records by step, at least one step.
    metrics: lines of metrics.jsonl, in order.
    documents: `frontiers.replicates` of the steps that have them; without, what
      is shown of frontiers has no intervals.
  """
  last = evaluations[max(evaluations)]
  resampled = (documents or {}).get(max(evaluations))
  sites = sorted({r['site'] for r in last})
  parts = [
    f'<h1>{html.escape(title)}</h1>',
    f'<p class="lead">{html.escape(_lead(last))}</p>',
  ]
  for site in sites:
    own = [r for r in last if r['site'] == site]
    ratios = pareto.ratio_history(evaluations, site, documents)
    parts.append(_site(site, own, ratios, resampled, len(sites) > 1))
  parts += [_training(last, metrics), _table(last)]
  return document(title, '\n'.join(parts))


def document(title: str, body: str) -> str:
  """A page of its own, with the style sheet in it.

  Args:
    title: plain text.
    body: HTML.
  """
  here = importlib.resources.files('gsae_jax.evaluation')
  style = (here / 'page.css').read_text()
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{html.escape(title)}</title><style>{style}</style></head>'
    f'<body><main>{body}</main></body></html>\n'
  )


def _lead(records: Sequence[Record]) -> str:
  r = records[0]
  names = sorted(label_of(kind) for kind in kinds(records))
  return (
    f'{len(records)} sparse autoencoders ({"; ".join(names)}) after '
    f'{r["tokens_trained"]:,} activations each, evaluated on '
    f'{r["num_tokens"]:,} held-out tokens; clean cross-entropy '
    f'{r["ce_clean"]:.4f} nats per token.'
  )


def _site(
  site: str,
  last: list[Record],
  ratios: list[pareto.Seen],
  resampled: Replicates | None,
  many: bool,
) -> str:
  heading = f'<h2>{html.escape(site)}</h2>' if many else ''
  frames = [
    frame(
      'Loss recovered against sparsity',
      'Up and to the left is better. Lines join each architecture’s frontier; '
      'every SAE is shown. Bands are 95 % of resamplings of documents and seeds.',
      figures.figure(
        series.of_frontiers(last, resampled),
        x_label='L0, features active per token (log)',
        y_label='loss recovered',
        title=f'Pareto frontier at {site}',
        log_x=True,
      ),
    ),
    frame(
      'Relative reconstruction bias γ',
      'Below 1, reconstructions are too small: shrinkage.',
      figures.figure(
        series.by_kind(last, 'gamma'),
        x_label='L0, features active per token (log)',
        y_label='γ',
        title=f'gamma at {site}',
        log_x=True,
        guide=1.0,
      ),
    ),
  ]
  if len(ratios) > 1:
    frames.append(
      frame(
        'L0 ratio at equal loss recovered, over training',
        'Gated over baseline, 1 is level. The baseline converges more slowly, '
        'so a short run flatters Gated; settled means within '
        f'{pareto.SETTLED:.0%} of the ratio at half the activations.',
        figures.figure(
          [series.of_history(ratios)],
          x_label='activations seen by each SAE',
          y_label='L0 ratio',
          title=f'L0 ratio at {site}',
          guide=1.0,
        ),
      )
    )
  frames.append(
    frame(
      'Explained variance against sparsity',
      'One minus the variance that the reconstruction leaves.',
      figures.figure(
        series.by_kind(last, 'explained_variance'),
        x_label='L0, features active per token (log)',
        y_label='explained variance',
        title=f'Explained variance at {site}',
        log_x=True,
      ),
    )
  )
  return (
    f'{heading}{_cards(last, ratios)}<h2>Fidelity</h2>'
    f'<div class="figures">{"".join(frames)}</div>'
  )


def frame(heading: str, caption: str, svg: str) -> str:
  return (
    f'<figure><h3>{html.escape(heading)}</h3>{svg}'
    f'<figcaption>{html.escape(caption)}</figcaption></figure>'
  )


def _cards(records: list[Record], ratios: list[pareto.Seen]) -> str:
  cards = []
  if ratios:
    note = 'L0, Gated over baseline at equal loss recovered'
    if not pareto.settled(ratios):
      note += '<br><em class="flag">not converged</em>'
    ratio = ratios[-1].ratio
    if ratio.interval:
      note += '<br>95 % interval {:.2f} to {:.2f}'.format(*ratio.interval)
    cards.append((f'{ratio.value:.2f}', note))
  for kind in kinds(records):
    gammas = [
      r['gamma']
      for r in records
      if pareto.kind(r) == kind and r['gamma'] is not None
    ]
    if gammas:
      cards.append(
        (
          f'{min(gammas):.3f}–{max(gammas):.3f}',
          f'γ, {html.escape(label_of(kind))}',
        )
      )
  cards.append((f'{records[0]["ce_clean"]:.3f}', 'clean cross-entropy, nats'))
  cards.append(
    (
      f'{records[0]["ce_zero_ablation"]:.3f}',
      'cross-entropy with the site at zero',
    )
  )
  return '<div class="cards">{}</div>'.format(
    ''.join(
      f'<div class="card"><b>{value}</b><span>{note}</span></div>'
      for value, note in cards
    )
  )


def _training(records: Sequence[Record], metrics: Sequence[dict]) -> str:
  if not metrics:
    return ''
  frames = []
  for key, label, log in (
    ('loss', 'training loss', True),
    ('l0', 'L0 (log)', True),
    ('alive_fraction', 'alive features', False),
  ):
    curves = []
    for name, style in kinds(records).items():
      own = sorted(
        (r for r in records if pareto.kind(r) == name),
        key=lambda r: r['l1_coefficient'],
      )
      for i, r in enumerate(own):
        curves.append(
          figures.Series(
            f'{label_of(name)}, stronger with rising L1',
            style,
            _curve(metrics, r['member'], key),
            dots=False,
            opacity=0.35 + 0.65 * (i + 1) / len(own),
          )
        )
    frames.append(
      frame(
        label.capitalize(),
        'One line per SAE.',
        figures.figure(
          curves, x_label='step', y_label=label, title=label, log_y=log
        ),
      )
    )
  return f'<h2>Training</h2><div class="figures">{"".join(frames)}</div>'


def _curve(
  metrics: Sequence[dict], member: str, key: str, most: int = 300
) -> list[tuple[float, float, str]]:
  points = [
    (m['step'], m[key], member)
    for m in metrics
    if m['member'] == member
    and all(map(figures.has_place, (m['step'], m.get(key))))
  ]
  return points[:: max(1, len(points) // most)]


def _table(records: Sequence[Record]) -> str:
  head = ''.join(
    f'<th>{html.escape(name)}</th>' for _, name, _ in pareto.COLUMNS
  )
  rows, styles = [], kinds(records)
  for r in pareto.ordered(records):
    first, *rest = (html.escape(c) for c in pareto.cells(r))
    style = styles[pareto.kind(r)]
    rows.append(
      f'<tr><td><i class="s-{style}"></i>{first}</td>'
      + ''.join(f'<td>{c}</td>' for c in rest)
      + '</tr>'
    )
  return (
    '<h2>Every SAE</h2><div class="scroll"><table><thead><tr>'
    f'{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    '<p class="note">L0, loss recovered and gamma as in arXiv 2404.16014, each '
    'a ratio of sums over all evaluated tokens. Special tokens keep their '
    'activations and are not counted.</p>'
  )
