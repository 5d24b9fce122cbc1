"""Bootstrap intervals over documents.

Tokens of a document are not independent, so documents are what is drawn anew. The
draws are the same for every SAE that was evaluated on the same documents: ratios
and differences between SAEs are paired.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

REPLICATES = 1000
LEVEL = 0.95


@functools.cache
def draws(documents: int, replicates: int = REPLICATES) -> np.ndarray:
  """How often each document is drawn, `[replicates, documents]` float64."""
  rng = np.random.default_rng(0)
  shares = np.full(documents, 1 / documents)
  drawn = rng.multinomial(documents, shares, size=replicates)
  drawn = drawn.astype(np.float64)
  drawn.flags.writeable = False  # It is kept.
  return drawn


def resample(
  sums: Mapping[str, np.ndarray], replicates: int = REPLICATES
) -> dict[str, np.ndarray]:
  """Sums over documents drawn with replacement.

  Args:
    sums: `[documents]` each.
    replicates: how many times they are drawn, R.

  Returns:
    `[R]` each.
  """
  (documents,) = {len(values) for values in sums.values()}
  draws_RN = draws(documents, replicates)
  return {name: draws_RN @ values for name, values in sums.items()}


def interval(values: np.ndarray, level: float = LEVEL) -> list[float] | None:
  """The central part of the replicates (percentile method).

  Args:
    values: `[R]`; those that are undefined are left out.
    level: the share between the bounds.

  Returns:
    lower and upper bound; None where a tenth or more are undefined, or all are
    one value, as of a single document.
  """
  finite = values[np.isfinite(values)]
  if len(finite) <= 0.9 * len(values) or np.ptp(finite) == 0:
    return None
  tail = 50 * (1 - level)
  low, high = np.percentile(finite, [tail, 100 - tail])
  return [float(low), float(high)]


def seed_draws(
  seeds_M: Sequence[int], count: int, rng: np.random.Generator
) -> np.ndarray:
  """How often each of M SAEs is there when whole seeds are drawn anew, `[R, M]`.

  One less is drawn than there are: a bootstrap of n things varies as if they were
  n - 1 (Rao and Wu 1988), which matters where n is 3. A single one always is.
  """
  seeds, of_M = np.unique(seeds_M, return_inverse=True)
  shares = np.full(len(seeds), 1 / len(seeds))
  drawn_RS = rng.multinomial(max(1, len(seeds) - 1), shares, size=count)
  return drawn_RS[:, of_M]
