"""The members of a study, made from the members of any config.

A config's `saes` say which sites have both arms, Gated and baseline, how wide each
is, its learning rate, and over which coefficients it is swept; a study takes the
ends of that range and lays its own coefficients and seeds between them.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gsae_jax.config import MemberConfig
from gsae_jax.errors import UserError
from gsae_jax.sae import variant

Member = dict[str, Any]

# Paper 5.1. Named as in experiments/variants.py.
ABLATIONS = {
  'unfrozen': {'freeze_aux_decoder': False},
  'no_r_mag': {'encoder': 'no_r_mag'},
  'untied': {'encoder': 'untied'},
}
EQUAL_WIDTH = 'relu_equal_width'
RESCALE_SHIFT = 'rescale_shift'


@dataclasses.dataclass(frozen=True)
class Arm:
  """What all SAEs of one architecture at one site have in common.

  Attributes:
    architecture: 'gated' or 'relu'.
    site: its name.
    features: F.
    learning_rate: None is the run's.
    loss_scale: None is the run's.
    ends: smallest and largest coefficient.
  """

  architecture: str
  site: str
  features: int
  learning_rate: float | None
  loss_scale: str | None
  ends: tuple[float, float]

  def coefficients(self, count: int) -> list[float]:
    """So many, geometrically spaced, to four figures."""
    return [float(f'{v:.4g}') for v in np.geomspace(*self.ends, count)]

  def member(self, name: str, l1: float, seed: int, **changes: Any) -> Member:
    """A member of a config; what follows the run is left out."""
    member = {
      'name': f'{name}_{self.site}_l{l1:g}_s{seed}',
      'architecture': self.architecture,
      'site': self.site,
      'features': self.features,
      'l1': l1,
      'seed': seed,
      'learning_rate': self.learning_rate,
      'loss_scale': self.loss_scale,
    }
    return {k: v for k, v in (member | changes).items() if v is not None}


def find(saes: Sequence[MemberConfig]) -> dict[str, tuple[Arm, Arm]]:
  """Both arms, Gated first, of every site that has them, in the config's order.

  Variants and other architectures are passed over. Where members of an arm differ
  in width, the width of most is taken, the larger of two; and of those the
  learning rate and loss scale of most.

  Raises:
    UserError: no site has both arms, or an arm has no range of coefficients.
  """
  found = collections.defaultdict(list)
  for s in saes:
    plain = not variant(dataclasses.asdict(s))
    if s.architecture in ('gated', 'relu') and plain:
      found[s.site, s.architecture].append(s)
  sites = dict.fromkeys(s.site for s in saes)
  pairs = {
    site: (_arm(found[site, 'gated']), _arm(found[site, 'relu']))
    for site in sites
    if found[site, 'gated'] and found[site, 'relu']
  }
  if not pairs:
    raise UserError(
      "config field saes: no site has both arms, 'gated' and 'relu' without "
      'variants; a study compares the two'
    )
  return pairs


def _arm(saes: Sequence[MemberConfig]) -> Arm:
  features = _most(sorted((s.features for s in saes), reverse=True))
  saes = [s for s in saes if s.features == features]
  l1 = [s.l1 for s in saes]
  first = saes[0]
  if not 0 < min(l1) < max(l1):
    raise UserError(
      f'config field saes: {first.architecture!r} at {first.site} has the '
      f'coefficients {min(l1):g} to {max(l1):g}; a study spaces its own '
      'geometrically between the smallest and the largest, so give two above 0'
    )
  return Arm(
    first.architecture,
    first.site,
    features,
    _most(s.learning_rate for s in saes),
    _most(s.loss_scale for s in saes),
    (min(l1), max(l1)),
  )


def _most(values: Iterable[Any]) -> Any:
  """The most frequent, the first of equals."""
  return collections.Counter(values).most_common(1)[0][0]


def of_arms(
  pairs: dict[str, tuple[Arm, Arm]], coefficients: int, seeds: int
) -> tuple[Member, ...]:
  """The study's benchmark (4.1): both arms everywhere."""
  return tuple(
    arm.member(arm.architecture, l1, seed)
    for pair in pairs.values()
    for arm in pair
    for l1 in arm.coefficients(coefficients)
    for seed in range(seeds)
  )


def some(values: Sequence[float], count: int) -> list[float]:
  """So many of the values, evenly over their order, both ends among them."""
  at = np.round(np.linspace(0, len(values) - 1, min(count, len(values))))
  return [values[int(i)] for i in at]


def of_ablations(
  pair: tuple[Arm, Arm], coefficients: Sequence[int], seeds: int
) -> tuple[Member, ...]:
  """Sections 5.1 and 5.2: Gated's ablations, and a baseline of equal width.

  Args:
    pair: both arms of a site.
    coefficients: how many the arms have, and how many of those are taken.
    seeds: of each.
  """
  gated, relu = pair
  narrow = dataclasses.replace(relu, features=gated.features)
  return tuple(
    arm.member(name, l1, seed, **changes)
    for arm, name, changes in (
      *((gated, name, changes) for name, changes in ABLATIONS.items()),
      (narrow, EQUAL_WIDTH, {}),
    )
    for l1 in some(arm.coefficients(coefficients[0]), coefficients[1])
    for seed in range(seeds)
  )


def of_shift(
  pair: tuple[Arm, Arm], ablations: Sequence[Member], workdir: str
) -> tuple[Member, ...]:
  """Rescale & shift (5.2) on every baseline of equal width, at Gated's rate.

  Args:
    pair: both arms of the site.
    ablations: of `of_ablations`.
    workdir: where those were trained.
  """
  rate = pair[0].learning_rate
  own = {'learning_rate': rate} if rate else {}  # Else it is the run's.
  return tuple(
    {k: v for k, v in m.items() if k != 'learning_rate'}
    | {
      'name': m['name'].replace(EQUAL_WIDTH, RESCALE_SHIFT),
      'architecture': 'rescale_shift',
      'l1': 0.0,
      'baseline': workdir,
      'baseline_member': m['name'],
    }
    | own
    for m in ablations
    if m['name'].startswith(EQUAL_WIDTH)
  )
