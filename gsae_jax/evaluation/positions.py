"""Which positions of a text count, who takes them, and sums by document."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gsae_jax.lm.contexts import Contexts


@dataclasses.dataclass(frozen=True)
class Processes:
  """Which of the batches are this process's, and how all come together.

  Attributes:
    index: this one.
    count: how many there are.
    gather: a tree of arrays to the same of all processes, along a new first axis.
  """

  index: int = 0
  count: int = 1
  gather: Callable[[Any], Any] = lambda tree: jax.tree.map(
    lambda v: v[None], tree
  )


class Positions:
  """The positions that count under one policy.

  Attributes:
    mask_CL: True where they do.
    ids: uint64, of the documents that they are of.
    batches: token ids of the contexts, `[batches, B, L]`.
    masks: the same of the mask.
    sites: sums of a site's own, `metrics.OF_SITE`, once they are known.
    means: of a site's activations, `[D]`.
  """

  def __init__(self, contexts: Contexts, mask_CL: np.ndarray, batch_size: int):
    self.mask_CL = mask_CL
    self.ids = np.unique(contexts.documents_CL[mask_CL])
    # Of other documents, nothing counts: where they are added does not matter.
    document_CL = np.searchsorted(self.ids, contexts.documents_CL)
    document_CL = np.minimum(document_CL, len(self.ids) - 1)
    # The last batch is filled up with contexts of weight 0.
    pad = ((0, -len(mask_CL) % batch_size), (0, 0))
    batched = lambda v: np.pad(v, pad).reshape(-1, batch_size, v.shape[1])
    self.masks = batched(mask_CL)
    self.batches = batched(contexts.ids_CL)
    self._documents = batched(document_CL)
    self.sites: dict[str, dict[str, np.ndarray]] = {}
    self.means: dict[str, np.ndarray] = {}

  def nothing(self, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Sums before the first batch."""
    return {name: np.zeros(len(self.ids)) for name in names}

  def add(
    self, sums: dict[str, np.ndarray], batch: int, values: dict[str, np.ndarray]
  ) -> None:
    """Adds values `[B, L]` of a batch, 0 where none counts, in float64."""
    documents = self._documents[batch].ravel()
    for name, value_BL in values.items():
      sums[name] += np.bincount(
        documents, value_BL.ravel().astype(np.float64), len(self.ids)
      )

  def counted(self) -> dict[str, np.ndarray]:
    """How many tokens each document has, and how many predictions."""
    sums = self.nothing(('tokens', 'predictions'))
    for batch, mask_BL in enumerate(self.masks):
      predicted_BL = mask_BL.copy()
      predicted_BL[:, -1] = False  # Nothing is predicted from the last one.
      self.add(sums, batch, {'tokens': mask_BL, 'predictions': predicted_BL})
    return sums
