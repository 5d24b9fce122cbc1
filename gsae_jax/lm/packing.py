"""From documents to contexts, as fast as the tokenizer goes."""

from collections.abc import Iterable, Iterator

import numpy as np

from gsae_jax.errors import UserError
from gsae_jax.lm.contexts import Contexts, Held
from gsae_jax.lm.documents import document_id
from gsae_jax.lm.tokenizer import Tokenizer

# Ids of some documents, each with its `document_id`.
_Batch = list[tuple[list[int], int]]

# What is tokenised together: enough to use every core, little enough that the
# tokenizer's own notes, of some 100 bytes per token, do not matter.
_DOCUMENTS = 256
_CHARACTERS = 2**20


def pack(
  texts: Iterable[str],
  tokenizer: Tokenizer,
  *,
  context_length: int,
  packing: str,
  prepend_bos: bool,
  special_tokens: str,
  rows: int | None,
  stride: int = 1,
) -> Contexts:
  """Packs documents into contexts until `rows` positions count.

  The arguments are those of `windows`. With `rows` None it packs all of them.

  Raises:
    UserError: the text has too few tokens, or the tokenizer has no BOS.
  """
  (contexts,) = windows(
    texts,
    tokenizer,
    context_length=context_length,
    packing=packing,
    prepend_bos=prepend_bos,
    special_tokens=special_tokens,
    rows=rows,
    stride=stride,
    window=None,
  )
  return contexts


def windows(
  texts: Iterable[str],
  tokenizer: Tokenizer,
  *,
  context_length: int,
  packing: str,
  prepend_bos: bool,
  special_tokens: str,
  rows: int | None,
  window: int | None,
  stride: int = 1,
) -> Iterator[Contexts]:
  """Packs documents into contexts, and yields so many contexts at a time.

  With `prepend_bos`, every document and every context begins with BOS, so that
  a document that runs over a context's end goes on behind a BOS of its own;
  without, documents follow each other with nothing between them.

  Args:
    texts: documents, used in order until there are enough.
    tokenizer: makes the ids.
    context_length: positions per context, BOS included.
    packing: 'stream' cuts the documents, one after the other, into contexts;
      'documents' begins every context at the beginning of a document, goes on
      with the next where one is short, and leaves out what does not fit, for
      models that saw texts only from their beginning.
    prepend_bos: see above.
    special_tokens: see `Contexts`.
    rows: positions wanted in the mask, at least; None for all there are. What
      is behind them is left out.
    window: contexts to yield at a time, but for the last; None for all.
    stride: of so many contexts in a row, only the first is taken.

  Raises:
    UserError: the text has too few tokens, or the tokenizer has no BOS.
  """
  if prepend_bos and tokenizer.bos_id is None:
    raise UserError(
      'text.prepend_bos: the tokenizer names no bos_token; set it to False'
    )
  cut = {'stream': _cut_stream, 'documents': _cut_documents}[packing]
  blocks = cut(
    _tokenised(texts, tokenizer),
    context_length,
    tokenizer.bos_id if prepend_bos else None,
  )
  counted = seen = 0
  held = Held(context_length)
  try:
    for ids_CL, starts_R, documents_R in blocks:
      block = Contexts(
        ids_CL, tokenizer.special_ids, special_tokens, starts_R, documents_R
      )
      skipped = -seen % stride
      seen += len(block)
      block = block.every(stride, skipped)
      total_C = counted + np.cumsum(block.counted())
      at = 0
      while at < len(block):
        stop = len(block)
        if rows is not None:
          stop = min(stop, int(np.searchsorted(total_C, rows)) + 1)
        if window is not None:
          stop = min(stop, at + window - len(held))
        held.add(block.part(at, stop))
        counted = int(total_C[stop - 1])
        enough = rows is not None and counted >= rows
        if enough or len(held) == window:
          yield held.contexts()
          held = Held(context_length)
        if enough:
          return
        at = stop
    if rows is not None:
      hint = ''
      if stride > 1:
        hint = f'; eval.stride leaves out {stride - 1} of {stride} contexts'
      if packing == 'documents':
        hint += (
          "; text.packing='documents' leaves out what a document has beyond a "
          "context, and 'stream' does not"
        )
      raise UserError(
        f'text.path: the text has {counted} usable tokens in full contexts of '
        f'{context_length}, and {rows} are asked for; give more text or ask for '
        f'fewer (store.tokens, eval.tokens){hint}'
      )
    if len(held):
      yield held.contexts()
  finally:
    held.close()


def _tokenised(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[_Batch]:
  """Yields the ids of some documents at a time, and the documents'."""

  def encoded(batch):
    ids = tokenizer.encode(batch)
    return list(zip(ids, map(document_id, batch), strict=True))

  batch, size = [], 0
  for text in texts:
    batch.append(text)
    size += len(text)
    if len(batch) == _DOCUMENTS or size >= _CHARACTERS:
      yield encoded(batch)
      batch, size = [], 0
  if batch:
    yield encoded(batch)


def _cut_documents(
  batches: Iterable[_Batch], length: int, bos: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Yields ids, starts and documents: the next document when one is full."""
  lead = [] if bos is None else [bos]
  # A context that short documents have not filled.
  begun: list[int] = []
  begun_runs: list[tuple[int, int]] = []
  for batch in batches:
    rows: list[list[int]] = []
    runs: list[tuple[int, int]] = []
    for ids, document in batch:
      begun_runs.append((len(rows) * length + len(begun), document))
      begun += lead + ids[:length]
      if len(begun) >= length:
        rows.append(begun[:length])
        runs += begun_runs
        begun, begun_runs = [], []
    starts, documents = zip(*runs, strict=True) if runs else ((), ())
    yield (
      np.array(rows, np.int32).reshape(-1, length),
      np.array(starts, np.int64),
      np.array(documents, np.uint64),
    )
    done = len(rows) * length
    begun_runs = [(start - done, document) for start, document in begun_runs]


def _cut_stream(
  batches: Iterable[_Batch], length: int, bos: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Yields ids, starts and documents: one document after the other."""
  lead = np.array([] if bos is None else [bos], np.int32)
  tokens = np.zeros(0, np.int32)
  starts, documents = [], []
  for batch in batches:
    pieces, size = [tokens], len(tokens)
    for ids, document in batch:
      pieces += [lead, np.array(ids, np.int32)]
      starts.append(size)
      documents.append(document)
      size += len(lead) + len(ids)
    tokens = np.concatenate(pieces)
    begins_C, stop = _begins(tokens, length, bos)
    # A BOS of the document itself, at a context's beginning, is not doubled.
    led_C = (tokens[begins_C] != bos) & (bos is not None)
    ids_CL = tokens[begins_C[:, None] - led_C[:, None] + np.arange(length)]
    if bos is not None:
      ids_CL[led_C, 0] = bos
    starts_R = np.array(starts)
    inside = int(np.searchsorted(starts_R, stop))
    # A BOS in front belongs to the text that goes on behind it.
    context_R = np.searchsorted(begins_C, starts_R[:inside], side='right') - 1
    within_R = starts_R[:inside] - begins_C[context_R]
    within_R += (within_R > 0) & led_C[context_R]
    yield (
      ids_CL,
      context_R * length + within_R,
      np.array(documents[:inside], np.uint64),
    )
    tokens = tokens[stop:]
    # What is left over begins in the last document that was cut, if any was.
    first = max(inside - 1, 0)
    starts = np.maximum(starts_R[first:] - stop, 0).tolist()
    documents = documents[first:]


def _begins(
  tokens: np.ndarray, length: int, bos: int | None
) -> tuple[np.ndarray, int]:
  """Where contexts begin in a row of tokens, and where the last of them ends."""
  if bos is None:
    count = len(tokens) // length
    return length * np.arange(count), length * count
  is_bos = (tokens == bos).tolist()
  begins, at = [], 0
  while at < len(tokens):
    take = length if is_bos[at] else length - 1
    if at + take > len(tokens):
      break
    begins.append(at)
    at += take
  return np.array(begins, np.int64), at
