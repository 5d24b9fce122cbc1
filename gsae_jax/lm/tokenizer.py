"""A model's tokenizer, from its folder."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import tokenizers

from gsae_jax.errors import UserError


class Tokenizer:
  """A `tokenizer.json` with the ids of its special tokens.

  Attributes:
    bos_id: id of the beginning-of-text token, or None.
    adds_bos: whether the model is used to a BOS in front of a text.
    special_ids: sorted ids of every token marked special.
    digest: SHA-256 of the file.
    vocabulary: ids are below it.
  """

  def __init__(self, folder: str, vocabulary: int | None = None):
    """Reads a folder's tokenizer.

    Args:
      folder: has a tokenizer.json.
      vocabulary: how many embeddings the model has; None is as many as needed.

    Raises:
      UserError: there is none, or it is another model's.
    """
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
    # What a file was last used with would cut documents, or fill them up.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.digest = hashlib.sha256(raw).hexdigest()
    own = self._tokenizer.get_vocab(with_added_tokens=False).values()
    largest = max(own, default=-1)
    self.vocabulary = largest + 1 if vocabulary is None else vocabulary
    if largest >= self.vocabulary:
      raise UserError(
        f'lm.path: the tokenizer in {folder} has ids up to {largest}, and the '
        f"model {vocabulary} embeddings; put the model's own tokenizer.json there"
      )
    added = self._tokenizer.get_added_tokens_decoder()
    self.special_ids = tuple(sorted(i for i, t in added.items() if t.special))
    self.bos_id = self._bos_id(folder)
    self.adds_bos = self._adds_bos(folder)

  def _bos_id(self, folder: str) -> int | None:
    for name, key in (
      ('tokenizer_config.json', 'bos_token'),
      ('config.json', 'bos_token_id'),
    ):
      path = os.path.join(folder, name)
      if os.path.exists(path):
        value = read_json(path).get(key)
        if isinstance(value, dict):  # An AddedToken written out.
          value = value.get('content')
        if isinstance(value, str):
          value = self._tokenizer.token_to_id(value)
        if value is not None:  # Id 0 is a token like any other.
          return value
    return None

  def _adds_bos(self, folder: str) -> bool:
    with_special = self._tokenizer.encode('a', add_special_tokens=True).ids
    if self.bos_id is not None and with_special[:1] == [self.bos_id]:
      return True
    # What transformers adds for tokenizers whose file does not say.
    path = os.path.join(folder, 'tokenizer_config.json')
    return os.path.exists(path) and bool(read_json(path).get('add_bos_token'))

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens around it.

    Raises:
      UserError: a text has a token that the model has no embedding for.
    """
    encodings = self._tokenizer.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    for encoding in encodings:
      # Tokens may be added that the model has never seen.
      if max(encoding.ids, default=0) >= self.vocabulary:
        unknown = max(encoding.ids)
        token = self._tokenizer.id_to_token(unknown)
        raise UserError(
          f'lm.path: the text has the token {token!r}, of id {unknown}, '
          f'and the model {self.vocabulary} embeddings; leave it out of the text'
        )
    return [e.ids for e in encodings]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of token ids, without its special tokens."""
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
  except (ValueError, RecursionError) as e:
    raise UserError(f'lm.path: {path} is not JSON ({e})') from e
  if not isinstance(value, dict):
    raise UserError(f'lm.path: {path} is not a JSON object')
  return value
