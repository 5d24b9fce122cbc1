"""Text in: documents, their train and held-out halves, tokens packed in contexts.

Every function is deterministic, so that harvest and evaluation agree on the
split without talking to each other.
"""

import dataclasses
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gsae_jax.errors import UserError
from gsae_jax.lm.tokenizer import Tokenizer

# Tables and generated code: long runs of literals that teach nothing of Python.
# Test suites and site-packages are not in every installation.
_STDLIB_SKIPPED = {
  '__pycache__', 'dist-packages', 'encodings', 'ensurepip', 'idlelib',
  'lib2to3', 'pydoc_data', 'site-packages', 'test', 'tests', 'turtledemo',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Documents:
  """Distinct documents in an order that depends on their content alone.

  Attributes:
    texts: the documents, sorted by SHA-256, which mixes sources.
    digest: SHA-256 over all of them, the identity of the text.
  """

  texts: tuple[str, ...]
  digest: str


@dataclasses.dataclass(frozen=True)
class Contexts:
  """Token ids packed into rows of one length.

  Attributes:
    ids_CL: `[contexts, context_length]` int32.
    mask_CL: `[contexts, context_length]` bool: the positions that count, in
      harvest, training and evaluation alike.
    special_CL: the same shape, True where the token is a special one.
    documents_CL: the same shape, uint64: `document_id` of each token's text.
  """

  ids_CL: np.ndarray
  mask_CL: np.ndarray
  special_CL: np.ndarray
  documents_CL: np.ndarray


def prepare(
  settings: Mapping[str, Any], tokenizer: Tokenizer, *, part: str, rows: int
) -> tuple[Documents, Contexts]:
  """Reads a text, takes one part of it and packs that.

  Args:
    settings: the arguments of `read_documents`, `split` and `pack` by name.
    tokenizer: the language model's.
    part: 'train' or 'held_out'.
    rows: positions wanted in the mask, at least.

  Returns:
    all documents, and the contexts of the part.
  """
  settings = dict(settings)
  held_out = settings.pop('held_out')
  documents = read_documents(settings.pop('path'), settings.pop('separator'))
  texts = split(documents, held_out, part)
  return documents, pack(texts, tokenizer, rows=rows, **settings)


def read_documents(path: str, separator: str | None) -> Documents:
  """Reads and de-duplicates documents.

  Args:
    path: a file, a glob, or 'stdlib' (this Python's own source files).
    separator: text between the documents of a file; None if a file is one.

  Raises:
    UserError: nothing matches `path`, or there is no text in it.
  """
  texts = {}
  for name in _files(path):
    with open(name, encoding='utf-8', errors='replace') as f:
      text = f.read()
    for document in text.split(separator) if separator else [text]:
      document = document.strip()
      if document:
        texts[hashlib.sha256(document.encode()).hexdigest()] = document
  if not texts:
    raise UserError(f'text.path: no text in {path}')
  keys = sorted(texts)
  digest = hashlib.sha256(''.join(keys).encode()).hexdigest()
  return Documents(tuple(texts[k] for k in keys), digest)


def _files(path: str) -> list[str]:
  if path == 'stdlib':
    root = sysconfig.get_paths()['stdlib']
    files = glob.glob(os.path.join(root, '**', '*.py'), recursive=True)
    files = [
      f
      for f in files
      if not _STDLIB_SKIPPED & set(os.path.relpath(f, root).split(os.sep))
    ]
  else:
    files = glob.glob(os.path.expanduser(path), recursive=True)
    files = [f for f in files if os.path.isfile(f)]
  if not files:
    raise UserError(
      f'text.path: no file matches {path!r}; give a text file, a glob, or '
      "'stdlib'"
    )
  return sorted(files)


def document_id(text: str) -> int:
  """The first 8 bytes of the text's SHA-256, by which a store names it."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def split(documents: Documents, held_out: float, part: str) -> tuple[str, ...]:
  """The documents of one part, 'train' or 'held_out'.

  A document's part is a function of its own content, so a document never
  changes sides when others come or go, and the parts share no text.
  """
  held = []
  train = []
  for text in documents.texts:
    h = int.from_bytes(hashlib.sha256(b'split' + text.encode()).digest()[:8])
    (held if h < held_out * 2**64 else train).append(text)
  chosen = {'train': train, 'held_out': held}[part]
  if not chosen:
    raise UserError(
      f'text.held_out: {held_out} of {len(documents.texts)} documents leaves '
      f'none for {part}; set text.separator so that the text has more '
      'documents, or change the fraction'
    )
  return tuple(chosen)


def pack(
  texts: Sequence[str],
  tokenizer: Tokenizer,
  *,
  context_length: int,
  packing: str,
  prepend_bos: bool,
  special_tokens: str,
  rows: int,
) -> Contexts:
  """Packs documents into contexts until `rows` positions count.

  With `prepend_bos`, every document and every context begins with BOS, so that
  a document that runs over a context's end goes on behind a BOS of its own;
  without, documents follow each other with nothing between them.

  Args:
    texts: documents, used in order until there are enough.
    tokenizer: makes the ids.
    context_length: positions per context, BOS included.
    packing: 'stream' cuts the documents, one after the other, into contexts;
      'documents' begins every context at the beginning of a document and
      leaves out what does not fit, for models that saw texts only whole.
    prepend_bos: see above.
    special_tokens: 'drop' leaves special tokens out of the mask, 'keep' does
      not.
    rows: positions wanted in the mask, at least.

  Raises:
    UserError: the text has too few tokens, or the tokenizer has no BOS.
  """
  contexts = []
  counted = 0
  special_ids = np.array(tokenizer.special_ids, np.int32)
  for piece, documents in pieces(
    texts,
    tokenizer,
    context_length=context_length,
    packing=packing,
    prepend_bos=prepend_bos,
  ):
    special = np.isin(piece, special_ids)
    mask = ~special if special_tokens == 'drop' else np.ones_like(special)
    contexts.append((piece, mask, special, documents))
    counted += int(mask.sum())
    if counted >= rows:
      break
  if counted < rows:
    raise UserError(
      f'text.path: the text has {counted} usable tokens in full contexts of '
      f'{context_length}, and {rows} are asked for; give more text or ask for '
      'fewer (store.tokens, eval.tokens)'
    )
  return Contexts(*(np.stack(a) for a in zip(*contexts, strict=True)))


def pieces(
  texts: Sequence[str],
  tokenizer: Tokenizer,
  *,
  context_length: int,
  packing: str,
  prepend_bos: bool,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields int32 contexts, every one full, and the documents of their tokens.

  The arguments are those of `pack`.
  """
  if prepend_bos and tokenizer.bos_id is None:
    raise UserError(
      'text.prepend_bos: the tokenizer names no bos_token; set it to False'
    )
  bos = [np.int32(tokenizer.bos_id)] if prepend_bos else []
  tail, sources = np.zeros(0, np.int32), np.zeros(0, np.uint64)
  for start in range(0, len(texts), 64):  # Batches use every core.
    batch = texts[start : start + 64]
    for text, ids in zip(batch, tokenizer.encode(batch), strict=True):
      tail = np.concatenate([tail, bos, ids]).astype(np.int32)
      source = np.uint64(document_id(text))
      sources = np.pad(
        sources, (0, len(tail) - len(sources)), constant_values=source
      )
      at = 0
      while True:
        begins = bos if at < len(tail) and tail[at] != tokenizer.bos_id else []
        take = context_length - len(begins)
        if len(tail) - at < take:
          tail, sources = tail[at:], sources[at:]
          break
        yield (
          np.concatenate([begins, tail[at : at + take]]).astype(np.int32),
          # A BOS in front belongs to the text that goes on behind it.
          np.pad(sources[at : at + take], (len(begins), 0), mode='edge'),
        )
        at += take
        if packing == 'documents':
          tail, sources = tail[:0], sources[:0]
          break
