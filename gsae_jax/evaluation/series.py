"""What is drawn of evaluation records: points, frontiers, bands, histories."""

from collections.abc import Sequence

from gsae_jax.evaluation import figures, frontiers, pareto
from gsae_jax.evaluation.frontiers import Replicates
from gsae_jax.evaluation.pareto import Record

LABELS = {'gated': 'Gated', 'relu': 'ReLU baseline'}
COLOURS = 12  # Of other kinds, in the style sheet.


def label_of(kind: str) -> str:
  return LABELS.get(kind, kind)


def kinds(records: Sequence[Record]) -> dict[str, str]:
  """What kinds of SAEs there are, with the style of each."""
  kinds = sorted({pareto.kind(r) for r in records})
  others = [k for k in kinds if k not in LABELS]
  return {
    k: k if k in LABELS else f'other{others.index(k) % COLOURS}' for k in kinds
  }


def hover(r: Record) -> str:
  show = lambda name, form: '–' if r[name] is None else f'{r[name]:{form}}'
  return (
    f'{r["member"]}: L1 {r["l1_coefficient"]:g}, L0 {r["l0"]:.1f}, loss '
    f'recovered {show("loss_recovered", ".4f")}, gamma {show("gamma", ".3f")}'
  )


def of_frontiers(
  records: Sequence[Record], resampled: Replicates | None = None
) -> list[figures.Series]:
  """Every SAE, and each kind's frontier with its band.

  Args:
    records: of one site.
    resampled: of `frontiers.replicates`; without, there are no bands.
  """
  drawn = []
  for name, style in kinds(records).items():
    own = [r for r in records if pareto.kind(r) == name]
    band = frontiers.band(own, resampled) if resampled else []
    for points, line in ((pareto.frontier(own), True), (own, False)):
      drawn.append(
        figures.Series(
          label_of(name),
          style,
          [
            (r['l0'], r['loss_recovered'], hover(r))
            for r in points
            if r['loss_recovered'] is not None
          ],
          line=line,
          dots=not line,
          band=band if line else (),
        )
      )
  return drawn


def by_kind(
  records: Sequence[Record], key: str, x: str = 'l0'
) -> list[figures.Series]:
  """A metric of every SAE, those of one kind and seed joined.

  Args:
    records: of one site.
    key: the metric.
    x: what it is drawn against.
  """
  drawn = []
  for name, style in kinds(records).items():
    own = [r for r in records if pareto.kind(r) == name and r[key] is not None]
    for seed in sorted({r['seed'] for r in own}):
      of_seed = [r for r in own if r['seed'] == seed]
      drawn.append(
        figures.Series(
          label_of(name),
          style,
          [
            (r[x], r[key], hover(r))
            for r in sorted(of_seed, key=lambda r: r[x])
          ],
        )
      )
  return drawn


def of_history(history: Sequence[pareto.Seen]) -> figures.Series:
  """The L0 ratio against activations seen, with its interval."""
  return figures.Series(
    'Gated / baseline',
    'gated',
    [
      (h.tokens, h.ratio.value, f'{h.tokens:,} activations: {h.ratio}')
      for h in history
    ],
    band=[
      (h.tokens, h.ratio.interval[0], h.ratio.interval[1])
      for h in history
      if h.ratio.interval
    ],
  )
