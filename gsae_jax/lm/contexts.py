"""Tokens in rows of one length, on disk until they are used."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np

from gsae_jax.errors import UserError

_COUNTED = 4096  # Contexts whose masks are in memory together.


@dataclasses.dataclass(frozen=True)
class Contexts:
  """Token ids packed into rows of one length: 4 bytes per token.

  All else is made of them when asked for, of all contexts or of some.

  Attributes:
    ids_CL: `[contexts, context_length]` int32; may lie in a file.
    special_ids: the tokenizer's.
    special_tokens: 'drop' leaves special tokens out of the mask, 'keep' does
      not.
    starts_R: int64, ascending from 0: where, in `ids_CL` as one row, a run of
      tokens of one document begins.
    documents_R: uint64, `document_id` of each run's text.
  """

  ids_CL: np.ndarray
  special_ids: tuple[int, ...]
  special_tokens: str
  starts_R: np.ndarray
  documents_R: np.ndarray

  def __len__(self) -> int:
    return len(self.ids_CL)

  def part(self, start: int, stop: int) -> 'Contexts':
    """The contexts from `start` to `stop`."""
    length = self.ids_CL.shape[1]
    first = np.searchsorted(self.starts_R, start * length, side='right') - 1
    last = np.searchsorted(self.starts_R, stop * length)
    return dataclasses.replace(
      self,
      ids_CL=self.ids_CL[start:stop],
      starts_R=np.maximum(self.starts_R[first:last] - start * length, 0),
      documents_R=self.documents_R[first:last],
    )

  def every(self, stride: int, first: int) -> 'Contexts':
    """Every so manieth context, from one on."""
    if stride == 1:
      return self
    length = self.ids_CL.shape[1]
    parts = [self.part(i, i + 1) for i in range(first, len(self), stride)]
    if not parts:
      return self.part(0, 0)
    return dataclasses.replace(
      self,
      ids_CL=self.ids_CL[first::stride],
      starts_R=np.concatenate(
        [part.starts_R + i * length for i, part in enumerate(parts)]
      ),
      documents_R=np.concatenate([part.documents_R for part in parts]),
    )

  def special(self, chosen_C=slice(None)) -> np.ndarray:
    """Bool `[chosen, context_length]`, True where the token is a special one."""
    return np.isin(self.ids_CL[chosen_C], self.special_ids)

  def mask(self, chosen_C=slice(None)) -> np.ndarray:
    """Bool `[chosen, context_length]`, True where the position counts.

    In harvest, training and evaluation alike.
    """
    special_CL = self.special(chosen_C)
    if self.special_tokens == 'drop':
      return ~special_CL
    return np.ones_like(special_CL)

  def documents(self, chosen_C=slice(None)) -> np.ndarray:
    """Uint64 `[chosen, context_length]`: `document_id` of each token's text."""
    count, length = self.ids_CL.shape
    begins_C = length * np.arange(count)[chosen_C]
    places_CL = begins_C[:, None] + np.arange(length)
    runs_CL = np.searchsorted(self.starts_R, places_CL, side='right') - 1
    return self.documents_R[runs_CL]

  mask_CL = property(mask)
  special_CL = property(special)
  documents_CL = property(documents)

  def slices(self) -> Iterator[slice]:
    """Slices of all contexts, each small enough for whole arrays."""
    for start in range(0, len(self), _COUNTED):
      yield slice(start, start + _COUNTED)

  def counted(self) -> np.ndarray:
    """How many positions count, in each of the contexts."""
    counted_C = np.empty(len(self), np.int64)
    for chosen in self.slices():
      counted_C[chosen] = self.mask(chosen).sum(1)
    return counted_C


class Held:
  """Collects contexts; their ids go to a file that has no name."""

  def __init__(self, context_length: int):
    self._length = context_length
    self._blocks: list[Contexts] = []
    self._count = 0
    self._file: IO[bytes] | None = None

  def __len__(self) -> int:
    return self._count

  def add(self, block: Contexts) -> None:
    """Appends contexts of the same tokenizer and policy.

    Raises:
      UserError: there is no room for them.
    """
    with _room():
      if self._file is None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 -- see `close`.
      self._file.write(np.ascontiguousarray(block.ids_CL).data)
    starts_R = block.starts_R + self._count * self._length
    none_CL = np.empty((0, self._length), np.int32)  # A view would keep all.
    self._blocks.append(
      dataclasses.replace(block, ids_CL=none_CL, starts_R=starts_R)
    )
    self._count += len(block)

  def contexts(self) -> Contexts:
    """All of them; ends the collection."""
    assert self._file is not None  # Nobody ends a collection of none.
    shape = self._count, self._length
    with _room():
      self._file.flush()
      ids_CL = np.memmap(self._file, np.int32, 'r', shape=shape)
    self.close()  # The map keeps the file.
    return dataclasses.replace(
      self._blocks[0],
      ids_CL=ids_CL.view(np.ndarray),
      starts_R=np.concatenate([b.starts_R for b in self._blocks]),
      documents_R=np.concatenate([b.documents_R for b in self._blocks]),
    )

  def close(self) -> None:
    """Lets go of the file."""
    if self._file is not None:
      self._file.close()


@contextlib.contextmanager
def _room():
  try:
    yield
  except OSError as e:
    raise UserError(
      f'text.window: cannot keep the tokens in {tempfile.gettempdir()} '
      f'({e.strerror}); set the environment variable TMPDIR to a place with 4 '
      'bytes for each, or text.window to fewer contexts'
    ) from e
