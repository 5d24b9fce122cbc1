r"""Figures 10 and 11: dictionaries without their encoders, at one site.

  python -m experiments.paper.ito --config=experiments/paper/embedded.py --workdir=DIR

Of each arm and seed, the SAEs whose L0 is nearest to 10, 30 and 100: what they
recover with their own encoders, and with codes that gradient pursuit finds at a
number of L0 targets (Appendix A); of the first seed, matching pursuit beside it.
"""

import dataclasses
import json
import math
from collections.abc import Sequence

import numpy as np
from etils import epath

from experiments.paper import fragments, runs, study
from experiments.paper.runs import Run
from gsae_jax import paths
from gsae_jax.evaluation import (
  bootstrap,
  figures,
  frontiers,
  page,
  records,
  series,
)
from gsae_jax.evaluation.frontiers import Comparison, Replicates
from gsae_jax.evaluation.pareto import Record

# Training L0 of the dictionaries that the paper compares.
TARGETS = (10, 30, 100)


def chosen(arms: Run, site: str) -> list[str]:
  """Names of each seed's SAEs nearest to `TARGETS` in log L0, Gated's first."""
  names = []
  for arm in ('gated', 'relu'):
    there = [r for r in arms.at(site, arm) if r['l0']]
    for seed in sorted({r['seed'] for r in there}):
      own = [r for r in there if r['seed'] == seed]
      names += dict.fromkeys(_nearest(own, t)['member'] for t in TARGETS)
  return names


def _nearest(own: Sequence[Record], l0: float) -> Record:
  return min(own, key=lambda r: abs(math.log(r['l0'] / l0)))


def measure(s: study.Study) -> Run:
  """Runs the pursuits, unless they were; what they gave."""
  arms = s.results('arms')
  names, folder = chosen(arms, s.ablation_site), s.folder('ito')
  config, finished = s.folder('arms') / 'config.json', folder / 'finished.json'
  c = s.config('arms')
  about = {'members': names, 'arms': json.loads(config.read_text())}
  text = json.dumps(about, indent=1) + '\n'
  if not (finished.exists() and finished.read_text() == text):
    s.command(
      'experiments.paper.pursuits',
      config,
      f'--workdir={s.folder("arms")}',
      f'--members={",".join(names)}',
      f'--out={folder}',
    )
    paths.write_whole(finished, text)
  return _read(folder, c.train.steps)


def _read(folder: epath.Path, step: int) -> Run:
  last = records.read_records(records.records_path(folder, step))
  return Run({step: last}, {step: runs.documents_of(folder, step)}, {})


@dataclasses.dataclass(frozen=True)
class Dictionary:
  """Records of one SAE's decoder: by its own encoder and by each pursuit."""

  own: Record
  gradient: list[Record]
  matching: list[Record]


def dictionaries(ito: Run) -> list[Dictionary]:
  """As `chosen` ordered them."""
  of = lambda name, method: [
    r
    for r in ito.last
    if r['dictionary'] == name and r['method'] == method
  ]  # fmt: skip
  return [
    Dictionary(*of(name, 'encoder'), of(name, 'gradient'), of(name, 'matching'))
    for name in dict.fromkeys(r['dictionary'] for r in ito.last)
  ]


def best(ito: Run) -> dict[str, list[Record]]:
  """By arm, the gradient pursuits of the best dictionary of each seed and K.

  Clipping leaves some a hundredth of an atom below K, which is no reason to prefer
  a worse one.
  """
  out = {}
  for arm in ('gated', 'relu'):
    top = {}
    for r in ito.last:
      if r['architecture'] == arm and r['method'] == 'gradient':
        at = r['seed'], r['k']
        top[at] = max(
          r, top.get(at, r), key=lambda r: r['loss_recovered'] or -math.inf
        )
    out[arm] = list(top.values())
  return out


def comparison(ito: Run) -> Comparison | None:
  """Gated's dictionaries against the baseline's, the best of each at a level."""
  found = best(ito)
  return frontiers.compare(found['gated'], found['relu'], ito.resampled)


def gaps(ito: Run) -> dict[str, tuple[float, np.ndarray]]:
  """By arm, what gradient pursuit recovers above the own encoder, at equal L0.

  Returns:
    the mean over the arm's dictionaries whose own L0 lies on the pursuit's
    frontier, and what it is in each resampling.
  """
  out = {}
  for arm in ('gated', 'relu'):
    found = [
      (d.own, *_above(d, ito.resampled))
      for d in dictionaries(ito)
      if d.own['architecture'] == arm
    ]
    found = [gap for gap in found if np.isfinite(gap[1])]
    if found:
      own, values, drawn = zip(*found, strict=True)
      drawn_RM = np.stack(drawn, -1)
      rng = np.random.default_rng(1)
      counts_RM = bootstrap.seed_draws(
        [r['seed'] for r in own], len(drawn_RM), rng
      )
      with np.errstate(invalid='ignore'):  # Seeds that have none of them.
        mean_R = (drawn_RM * counts_RM).sum(-1) / counts_RM.sum(-1)
      out[arm] = float(np.mean(values)), mean_R
  return out


def _above(d: Dictionary, resampled: Replicates) -> tuple[float, np.ndarray]:
  found = frontiers.side(d.gradient, resampled, np.random.default_rng(1))
  own = resampled[d.own['member']]
  if found.point is None:
    return math.nan, np.full(len(own['l0']), np.nan)
  value = found.point.recovered_at(np.log(d.own['l0']))
  drawn = [
    math.nan if f is None else f.recovered_at(log_l0)
    for f, log_l0 in zip(found.drawn, np.log(own['l0']), strict=True)
  ]
  return (
    float(value - d.own['loss_recovered']),
    np.array(drawn) - own['loss_recovered'],
  )


def fragment(ito: Run) -> str:
  frames, rows = [], []
  for d in dictionaries(ito):
    drawn = [
      figures.Series(
        label,
        style,
        [(r['l0'], r['loss_recovered'], series.hover(r)) for r in records],
        line=len(records) > 1,
        band=frontiers.band(records, ito.resampled) if style == 'gated' else (),
        dashed=style == 'relu',
      )
      for label, style, records in (
        ('gradient pursuit', 'gated', d.gradient),
        ('matching pursuit', 'relu', d.matching),
        ('its own encoder', 'other0', [d.own]),
      )
    ]
    heading = (
      f'{series.label_of(d.own["architecture"])}, trained to L0 '
      f'{d.own["l0"]:.1f}'
    )
    if d.matching:  # Of the first seed.
      frames.append(
        page.frame(
          heading,
          'One dictionary, whose codes are found in three ways.',
          figures.figure(
            drawn,
            x_label='L0 (log)',
            y_label='loss recovered',
            title=f'Inference-time optimisation, {heading}',
            log_x=True,
          ),
        )
      )
    for r in (d.own, *d.gradient, *d.matching):
      method = 'own encoder' if r['k'] is None else r['variant']
      recovered = r['loss_recovered']
      rows.append(
        [
          heading,
          method,
          '–' if r['k'] is None else str(r['k']),
          f'{r["l0"]:.1f}',
          '–' if recovered is None else f'{recovered:.4f}',
        ]
      )
  arms = best(ito)
  frames.insert(
    0,
    page.frame(
      'Decoders alone: gradient pursuit',
      'The best of each arm’s dictionaries at every L0.',
      figures.figure(
        series.of_frontiers(
          [r | {'variant': ''} for a in arms.values() for r in a],
          ito.resampled,
        ),
        x_label='L0 (log)',
        y_label='loss recovered',
        title='Dictionaries by gradient pursuit',
        log_x=True,
      ),
    ),
  )
  return fragments.section(
    'Inference-time optimisation (Figures 10, 11)',
    f'At {ito.sites[0]}: are the dictionaries better, whatever their encoders? L0 '
    'of Gated’s over the baseline’s at equal loss recovered: '
    f'{_ratio(comparison(ito))}. Loss that pursuit recovers above the own '
    f'encoder at equal L0: {_gaps(gaps(ito))}.',
    fragments.side_by_side(*frames),
    fragments.table(('dictionary', 'codes', 'K', 'L0', 'loss recovered'), rows),
  )


def _ratio(found: Comparison | None) -> str:
  return fragments.shown(found and found.l0_ratio)


def _gaps(found: dict[str, tuple[float, np.ndarray]]) -> str:
  shown = [
    f'{series.label_of(arm)} {frontiers.estimate(*gap)}'
    for arm, gap in found.items()
  ]
  return ', '.join(shown) or 'no L0 in common'


def make(s: study.Study) -> str:
  return fragment(measure(s))


if __name__ == '__main__':
  study.draw('ito', make)
