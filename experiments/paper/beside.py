"""The statistics of our claims, from the paper's own rows (tables.csv).

By the same functions as ours; the paper gives neither seeds nor intervals.
"""

import collections
import dataclasses
import functools
import statistics

from experiments.paper import tables
from gsae_jax.evaluation import pareto


@dataclasses.dataclass(frozen=True)
class Rows:
  """What all rows of the tables say.

  Attributes:
    ratios: L0 ratio of every site where the frontiers share a range.
    shares: of levels where Gated needs less, at those sites.
    best: of every site, whether the most loss is recovered by a Gated SAE.
    gammas: by arm.
    alive: share of alive features of every Gated SAE.
  """

  ratios: list[float]
  shares: list[float]
  best: list[bool]
  gammas: dict[str, list[float]]
  alive: list[float]

  def ratio_text(self) -> str:
    n = len(self.ratios)
    return (
      f'its tables, by this tool: median {statistics.median(self.ratios):.2f} of '
      f'{n} sites, below 1 at {sum(r < 1 for r in self.ratios)}, at or below 0.5 '
      f'at {sum(r <= 0.5 for r in self.ratios)}'
    )

  def share_text(self) -> str:
    whole = sum(s == 1 for s in self.shares)
    return (
      f'its tables, by this tool: all of the shared range at {whole} of '
      f'{len(self.shares)} sites'
    )

  def best_text(self) -> str:
    return f'its tables: at {sum(self.best)} of {len(self.best)} sites'

  def gamma_text(self) -> str:
    gated = self.gammas['gated']
    near = sum(0.98 <= g <= 1.02 for g in gated)
    return f'its tables: {near} of {len(gated)} Gated SAEs within 0.98 to 1.02'

  def baseline_text(self) -> str:
    relu = self.gammas['relu']
    return (
      f'its tables: baseline median {statistics.median(relu):.3f}, lowest '
      f'{min(relu):.3f}'
    )

  def alive_text(self) -> str:
    many = sum(a >= 0.6 for a in self.alive)
    return (
      f'its tables: {many} of {len(self.alive)} Gated SAEs have 60 % or more'
    )


@functools.cache
def rows() -> Rows:
  """Of both models."""
  ratios, shares, best, alive = [], [], [], []
  gammas = collections.defaultdict(list)
  for model in tables.MODELS:
    records = tables.records(model)
    for site in dict.fromkeys(r['site'] for r in records):
      own = [r for r in records if r['site'] == site]
      found = pareto.compare(own, 'gated', 'relu')
      if found is not None:
        ratios.append(found.l0_ratio.value)
        shares.append(found.share.value)
      # Rows of a negative L0 stand for nothing.
      known = [r for r in own if r['l0'] is not None]
      top = max(known, key=lambda r: r['loss_recovered'])
      best.append(top['architecture'] == 'gated')
    for r in records:
      gammas[r['architecture']].append(r['gamma'])
    alive += [
      r['alive_fraction'] for r in records if r['architecture'] == 'gated'
    ]
  return Rows(ratios, shares, best, dict(gammas), alive)
