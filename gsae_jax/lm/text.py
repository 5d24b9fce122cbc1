"""Text in: documents, their train and held-out halves, tokens packed in contexts.

Every function is deterministic, so that harvest and evaluation agree on the
split without talking to each other.
"""

import dataclasses
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from gsae_jax.errors import UserError

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
  """

  ids_CL: np.ndarray
  mask_CL: np.ndarray
  special_CL: np.ndarray


class Tokenizer:
  """A `tokenizer.json` with the ids of its special tokens.

  Attributes:
    bos_id: id of the beginning-of-text token, or None.
    special_ids: sorted ids of every token marked special.
    digest: SHA-256 of the file.
    largest_id: of all tokens; ids may leave gaps.
  """

  def __init__(self, folder: str):
    path = os.path.join(folder, 'tokenizer.json')
    if not os.path.exists(path):
      raise UserError(
        f'lm.path: {folder} has no tokenizer.json; save one there with '
        "transformers' AutoTokenizer.from_pretrained(...).save_pretrained"
      )
    with open(path, 'rb') as f:
      raw = f.read()
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(raw.decode())
    except Exception as e:  # The Rust library raises bare Exception.
      raise UserError(f'lm.path: {path} is not a tokenizer: {e}') from e
    self.digest = hashlib.sha256(raw).hexdigest()
    self.largest_id = max(self._tokenizer.get_vocab().values())
    added = self._tokenizer.get_added_tokens_decoder()
    self.special_ids = tuple(sorted(i for i, t in added.items() if t.special))
    self.bos_id = self._bos_id(folder)

  def _bos_id(self, folder: str) -> int | None:
    for name, key in (
      ('tokenizer_config.json', 'bos_token'),
      ('config.json', 'bos_token_id'),
    ):
      path = os.path.join(folder, name)
      if os.path.exists(path):
        value = read_json(path).get(key)
        if isinstance(value, dict):  # An AddedToken written out.
          value = value['content']
        if isinstance(value, str):
          value = self._tokenizer.token_to_id(value)
        if value is not None:  # Id 0 is a token like any other.
          return value
    return None

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens around it."""
    encodings = self._tokenizer.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [e.ids for e in encodings]

  def decode(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode(list(ids))


def read_json(path: str) -> dict[str, Any]:
  """The object in a JSON file of a model folder.

  Raises:
    UserError: there is no such file, or it holds something else.
  """
  try:
    with open(path) as f:
      value = json.load(f)
  except FileNotFoundError as e:
    folder, name = os.path.split(path)
    raise UserError(f'lm.path: {folder} has no {name}') from e
  except ValueError as e:
    raise UserError(f'lm.path: {path} is not JSON ({e})') from e
  if not isinstance(value, dict):
    raise UserError(f'lm.path: {path} is not a JSON object')
  return value


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
  for piece in pieces(
    texts,
    tokenizer,
    context_length=context_length,
    packing=packing,
    prepend_bos=prepend_bos,
  ):
    special = np.isin(piece, special_ids)
    mask = ~special if special_tokens == 'drop' else np.ones_like(special)
    contexts.append((piece, mask, special))
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
) -> Iterator[np.ndarray]:
  """Yields int32 contexts, every one full; the arguments are those of `pack`."""
  if prepend_bos and tokenizer.bos_id is None:
    raise UserError(
      'text.prepend_bos: the tokenizer names no bos_token; set it to False'
    )
  bos = [np.int32(tokenizer.bos_id)] if prepend_bos else []
  tail = np.zeros(0, np.int32)
  for start in range(0, len(texts), 64):  # Batches use every core.
    for ids in tokenizer.encode(texts[start : start + 64]):
      tail = np.concatenate([tail, bos, ids]).astype(np.int32)
      at = 0
      while True:
        begins = bos if at < len(tail) and tail[at] != tokenizer.bos_id else []
        take = context_length - len(begins)
        if len(tail) - at < take:
          tail = tail[at:]
          break
        yield np.concatenate([begins, tail[at : at + take]]).astype(np.int32)
        at += take
        if packing == 'documents':
          tail = tail[:0]
          break
