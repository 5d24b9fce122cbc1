"""Text in: documents, their train and held-out halves, contexts of tokens.

Every function is deterministic, so that harvest and evaluation agree on the
split without talking to each other.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from gsae_jax.errors import UserError
from gsae_jax.lm.ahead import ahead
from gsae_jax.lm.contexts import Contexts
from gsae_jax.lm.documents import Documents, locate, read_documents
from gsae_jax.lm.packing import pack, windows
from gsae_jax.lm.tokenizer import Tokenizer

_PLACE = 'path', 'separator', 'field', 'subset', 'split', 'revision'
_PACKING = 'context_length', 'packing', 'prepend_bos', 'special_tokens'


@dataclasses.dataclass(frozen=True)
class Text:
  """One part of a text, in windows.

  Attributes:
    documents: SHA-256 over all documents; None where not all are read.
    windows: the contexts, so many at a time; each iteration is from the first.
  """

  documents: str | None
  windows: Iterable[Contexts]


class _Windows:
  """Makes the windows anew for each iteration, one ahead."""

  def __init__(
    self,
    read: Callable[[], Iterable[str]],
    pack: Callable[[Iterable[str]], Iterator[Contexts]],
    tick: Callable[[], None],
  ):
    self._read = read
    self._pack = pack
    self._tick = tick

  def __iter__(self) -> Iterator[Contexts]:
    return ahead(
      lambda unwanted: self._pack(
        itertools.takewhile(lambda _: not unwanted(), self._read())
      ),
      self._tick,
    )


def resolve(
  settings: Mapping[str, Any], tokenizer: Tokenizer
) -> dict[str, Any]:
  """The config's fields `text.*` with the model's own policy where it counts."""
  settings = dict(settings)
  if settings['prepend_bos'] is None:
    settings['prepend_bos'] = tokenizer.adds_bos
  return settings


def check(settings: Mapping[str, Any]) -> None:
  """Raises UserError where there is no such text; reads none of it."""
  locate(**{name: settings[name] for name in _PLACE})


def prepare(
  settings: Mapping[str, Any],
  tokenizer: Tokenizer,
  *,
  part: str,
  rows: int,
  stride: int = 1,
  tick: Callable[[], None] = lambda: None,
) -> Text:
  """Takes one part of a text, and packs it.

  Args:
    settings: the config's fields `text.*`, resolved.
    tokenizer: the language model's.
    part: 'train' or 'held_out'.
    rows: positions wanted in the mask, at least.
    stride: of so many contexts in a row, only the first is taken.
    tick: called while text is read or waited for; may raise, to leave.
  """
  place = {name: settings[name] for name in _PLACE}
  held_out = settings['held_out']
  digest = None
  read: Callable[[], Iterable[str]]
  if settings['order'] == 'hash':
    documents = read_documents(**place)
    digest = documents.digest
    texts = split(documents, held_out, part)
    read = lambda: texts
  else:
    stored = locate(**place)
    read = lambda: _of_part(stored(), held_out, part)
  policy = {name: settings[name] for name in _PACKING}
  policy |= {'rows': rows, 'stride': stride}
  if settings['window'] is None:
    return Text(digest, [pack(_ticking(read(), tick), tokenizer, **policy)])
  policy['window'] = settings['window']
  return Text(
    digest,
    _Windows(read, lambda texts: windows(texts, tokenizer, **policy), tick),
  )


def _ticking(texts: Iterable[str], tick: Callable[[], None]) -> Iterator[str]:
  for text in texts:
    tick()
    yield text


def split(documents: Documents, held_out: float, part: str) -> tuple[str, ...]:
  """The documents of one part, 'train' or 'held_out'.

  A document's part is a function of its own content, so a document never
  changes sides when others come or go, and the parts share no text.
  """
  return tuple(_of_part(documents.texts, held_out, part))


def _of_part(texts: Iterable[str], held_out: float, part: str) -> Iterator[str]:
  count, chosen = 0, False
  for text in texts:
    count += 1
    h = int.from_bytes(hashlib.sha256(b'split' + text.encode()).digest()[:8])
    if (h < held_out * 2**64) == (part == 'held_out'):
      chosen = True
      yield text
  if not chosen:
    raise UserError(
      f'text.held_out: {held_out} of {count} documents leaves none for {part}; '
      'set text.separator so that the text has more documents, or change the '
      'fraction'
    )
