"""How two frontiers compare, and how sure that is.

What is drawn anew for an interval are the documents of the evaluation, the same
for all SAEs, and the seeds of each side, as wholes. With one seed only documents
are: the interval then says nothing of training.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gsae_jax.evaluation import bootstrap, metrics

Record = Mapping[str, Any]
# By member and metric, `[R]` each.
Replicates = Mapping[str, Mapping[str, np.ndarray]]

# At how many levels two frontiers are compared over the range that they share.
_LEVELS = 101


def replicates(sums: Mapping[str, metrics.Sums]) -> Replicates:
  """The metrics of every SAE, paired, for documents drawn anew.

  One document cannot be drawn anew: all are NaN then, and no interval follows.

  Args:
    sums: by member, `metrics.OF_SITE` and `metrics.OF_SAE`, `[documents]` each.
  """
  members = list(sums)
  if not members:
    return {}
  stacked_NM = {
    name: np.stack([sums[m][name] for m in members], -1)
    for name in (*metrics.OF_SITE, *metrics.OF_SAE)
  }
  ratios_RM = metrics.ratios(bootstrap.resample(stacked_NM))
  if len(stacked_NM['tokens']) < 2:
    ratios_RM = {k: np.full_like(v, np.nan) for k, v in ratios_RM.items()}
  return {
    member: {name: values[:, i] for name, values in ratios_RM.items()}
    for i, member in enumerate(members)
  }


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A number and where it lies in 95 % of resamplings; None where unknown."""

  value: float
  interval: list[float] | None

  def __str__(self) -> str:
    if self.interval is None:
      return f'{self.value:.3f}'
    low, high = self.interval
    return f'{self.value:.3f} [{low:.3f}, {high:.3f}]'


@dataclasses.dataclass(frozen=True)
class Frontier:
  """What no other SAE beats in both; rising in both, two points at least.

  Attributes:
    log_l0: `[K]`.
    recovered: loss recovered, `[K]`.
  """

  log_l0: np.ndarray
  recovered: np.ndarray

  def l0_at(self, recovered: np.ndarray) -> np.ndarray:
    """log L0 at levels of loss recovered, NaN beyond both ends."""
    return np.interp(
      recovered, self.recovered, self.log_l0, left=np.nan, right=np.nan
    )

  def recovered_at(self, log_l0: np.ndarray) -> np.ndarray:
    """Loss recovered at values of log L0, NaN beyond both ends."""
    return np.interp(
      log_l0, self.log_l0, self.recovered, left=np.nan, right=np.nan
    )


def best(
  l0_RM: np.ndarray, recovered_RM: np.ndarray, drawn_RM: np.ndarray | bool
) -> tuple[np.ndarray, np.ndarray]:
  """Which SAEs none of the others beats in both L0 and loss recovered.

  Args:
    l0_RM: L0 of M SAEs in R resamplings; those that are silent or not finite are
      left out.
    recovered_RM: their loss recovered.
    drawn_RM: whether the SAE is there.

  Returns:
    indices that sort each row by rising L0, and which of the sorted are kept.
  """
  there_RM = drawn_RM & (l0_RM > 0) & np.isfinite(l0_RM + recovered_RM)
  recovered_RM = np.where(there_RM, recovered_RM, -np.inf)
  order_RM = np.lexsort((-recovered_RM, l0_RM), axis=-1)
  recovered_RM = np.take_along_axis(recovered_RM, order_RM, -1)
  most_RM = np.maximum.accumulate(recovered_RM, -1)
  before_RM = np.roll(most_RM, 1, -1)
  before_RM[:, 0] = -np.inf
  return order_RM, recovered_RM > before_RM


def frontiers(
  l0_RM: np.ndarray, recovered_RM: np.ndarray, drawn_RM: np.ndarray | bool
) -> list[Frontier | None]:
  """One of each row, arguments as of `best`; None where it has one SAE or none."""
  order_RM, kept_RM = best(l0_RM, recovered_RM, drawn_RM)
  out = []
  for l0_M, recovered_M, order_M, kept_M in zip(
    l0_RM, recovered_RM, order_RM, kept_RM, strict=True
  ):
    at_K = order_M[kept_M]
    out.append(
      Frontier(np.log(l0_M[at_K]), recovered_M[at_K]) if len(at_K) > 1 else None
    )
  return out


@dataclasses.dataclass(frozen=True)
class Side:
  """One frontier, and what became of it in each resampling, of so many seeds."""

  point: Frontier | None
  drawn: list[Frontier | None]
  seeds: int


def side(
  records: Sequence[Record],
  resampled: Replicates | None,
  rng: np.random.Generator,
) -> Side:
  """The frontier of some records.

  Args:
    records: of one kind at one site.
    resampled: of `replicates`; None gives no resamplings.
    rng: draws seeds.
  """
  kept = [
    r
    for r in records
    if r['l0'] and r['loss_recovered'] is not None
  ]  # fmt: skip
  if not kept:
    return Side(None, [None] * (bootstrap.REPLICATES if resampled else 0), 0)
  pick = lambda name: np.array([[r[name] for r in kept]])
  (point,) = frontiers(pick('l0'), pick('loss_recovered'), True)
  seeds_M = [r['seed'] for r in kept]
  seeds = len(set(seeds_M))
  if not resampled:
    return Side(point, [], seeds)
  l0_RM, recovered_RM = (
    np.stack([resampled[r['member']][name] for r in kept], -1)
    for name in ('l0', 'loss_recovered')
  )
  drawn_RM = bootstrap.seed_draws(seeds_M, len(l0_RM), rng) > 0
  drawn = frontiers(l0_RM, recovered_RM, drawn_RM)
  return Side(point, drawn, seeds)


def _over_range(ours: Frontier, theirs: Frontier) -> tuple[float, float, float]:
  """Mean log L0 ratio, the share of levels where it is below 0, and the gap.

  NaN where no range is shared.
  """
  ratio = share = gap = np.nan
  low = max(ours.recovered[0], theirs.recovered[0])
  high = min(ours.recovered[-1], theirs.recovered[-1])
  if low < high:
    at = np.linspace(low, high, _LEVELS)
    difference = ours.l0_at(at) - theirs.l0_at(at)
    ratio, share = np.mean(difference), np.mean(difference < 0)
  low = max(ours.log_l0[0], theirs.log_l0[0])
  high = min(ours.log_l0[-1], theirs.log_l0[-1])
  if low < high:
    at = np.linspace(low, high, _LEVELS)
    gap = np.mean(ours.recovered_at(at) - theirs.recovered_at(at))
  return ratio, share, gap


@dataclasses.dataclass(frozen=True)
class Comparison:
  """One frontier against another, over the range that both reach.

  At a level of fidelity it does not matter on which scale fidelity is drawn, so
  the ratio at a level holds for log(1 - loss recovered) too, up to what lies
  between two SAEs; the mean over levels gives each step of loss recovered the
  same weight.

  Attributes:
    l0_ratio: L0 of ours over theirs at equal loss recovered, the geometric mean.
    share: of the levels of loss recovered, where ours needs the smaller L0.
    gap: loss recovered of ours less theirs at equal L0, the mean over log L0;
      None where no L0 is shared.
    levels: of loss recovered, `[K]`.
    ratios: L0 ratio at each of them.
    seeds: of the side that has fewer; of one, intervals leave training out.
  """

  l0_ratio: Estimate
  share: Estimate
  gap: Estimate | None
  levels: np.ndarray
  ratios: tuple[Estimate, ...]
  seeds: int


def compare(
  ours: Sequence[Record],
  theirs: Sequence[Record],
  resampled: Replicates | None = None,
  *,
  levels: int = 21,
) -> Comparison | None:
  """How the frontier of some records compares with that of others.

  Both are interpolated linearly in log L0.

  Args:
    ours: records of one site.
    theirs: of the same site.
    resampled: of `replicates`, with the members of both; None for numbers
      without intervals.
    levels: at how many of loss recovered the ratio is given, the ends of the
      shared range among them.

  Returns:
    None where the two share no range of loss recovered. An interval is None
    where a tenth of the resamplings or more have no such range.
  """
  rng = np.random.default_rng(1)
  a, b = (side(r, resampled, rng) for r in (ours, theirs))
  if a.point is None or b.point is None:
    return None
  ratio, share, gap = _over_range(a.point, b.point)
  if np.isnan(ratio):
    return None
  pairs = [
    None if x is None or y is None else (x, y)
    for x, y in zip(a.drawn, b.drawn, strict=True)
  ]
  undefined = (np.nan,) * 3
  ratio_R, share_R, gap_R = np.array(
    [_over_range(*pair) if pair else undefined for pair in pairs]
  ).reshape(-1, 3).T  # fmt: skip
  at = np.linspace(
    max(a.point.recovered[0], b.point.recovered[0]),
    min(a.point.recovered[-1], b.point.recovered[-1]),
    levels,
  )
  ratio_RK = np.array(
    [
      pair[0].l0_at(at) - pair[1].l0_at(at) if pair else np.full(levels, np.nan)
      for pair in pairs
    ]
  ).reshape(-1, levels)
  estimates = [
    estimate(np.exp(value), np.exp(drawn))
    for value, drawn in zip(
      a.point.l0_at(at) - b.point.l0_at(at), ratio_RK.T, strict=True
    )
  ]
  found = estimate(np.exp(ratio), np.exp(ratio_R))
  # All of the range, whatever is drawn, is a share that is sure.
  known = share_R[np.isfinite(share_R)]
  if found.interval and np.ptp(known) == 0:
    part = Estimate(float(share), [float(known[0])] * 2)
  else:
    part = estimate(share, share_R)
  return Comparison(
    found,
    part,
    None if np.isnan(gap) else estimate(gap, gap_R),
    at,
    tuple(estimates),
    min(a.seeds, b.seeds),
  )


def estimate(value: float, drawn_R: np.ndarray) -> Estimate:
  """A number, and its interval from what it was in each of R resamplings."""
  if not len(drawn_R):
    return Estimate(float(value), None)
  return Estimate(float(value), bootstrap.interval(drawn_R))


def band(
  records: Sequence[Record], resampled: Replicates, points: int = 41
) -> list[tuple[float, float, float]]:
  """Where a frontier lies in 95 % of resamplings.

  Returns:
    L0, lower and upper loss recovered, at values of L0 from one end of the
    frontier to the other; those that a tenth of the resamplings or more do not
    reach are left out.
  """
  found = side(records, resampled, np.random.default_rng(1))
  if found.point is None:
    return []
  at = np.linspace(found.point.log_l0[0], found.point.log_l0[-1], points)
  drawn_RK = np.array(
    [
      np.full(points, np.nan) if f is None else f.recovered_at(at)
      for f in found.drawn
    ]
  )
  bounds = map(bootstrap.interval, drawn_RK.T)
  return [
    (float(np.exp(x)), b[0], b[1]) for x, b in zip(at, bounds, strict=True) if b
  ]
