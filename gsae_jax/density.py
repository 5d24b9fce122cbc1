"""On what share of tokens features fire, as a histogram over features."""

from typing import Any

import numpy as np

# Half decades from 1e-7 to 1.
LOG10_EDGES = tuple(x / 2 for x in range(-14, 1))


def histogram(fired_F: np.ndarray, rows: int) -> dict[str, Any]:
  """Counts features by how often they fired.

  Args:
    fired_F: rows that each feature fired on.
    rows: how many there were.

  Returns:
    `rows`; `log10_edges`, the bounds of the bins; `features`, how many are in
    each, the upper bound belonging to the next but for the last; and `never`,
    how many did not fire at all.
  """
  fired = fired_F[fired_F > 0]
  edges = np.array(LOG10_EDGES)
  # Log of the counts, not of shares: 1 is then exact.
  logs = np.log10(fired) - np.log10(rows)
  bins = np.clip(np.searchsorted(edges, logs, 'right') - 1, 0, len(edges) - 2)
  return {
    'rows': rows,
    'log10_edges': list(LOG10_EDGES),
    'features': np.bincount(bins, minlength=len(edges) - 1).tolist(),
    'never': int(np.sum(fired_F == 0)),
  }
