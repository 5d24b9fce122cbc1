"""Reads a language model: config.json, safetensors, tokenizer.json."""

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gsae_jax.errors import UserError
from gsae_jax.lm import tensors as tensors_lib
from gsae_jax.lm.families import FAMILIES
from gsae_jax.lm.tensors import Tensor
from gsae_jax.lm.tokenizer import Tokenizer, read_json
from gsae_jax.lm.transformer import Transformer

DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}

# A parameter's path and shape to where it is to lie.
Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A model whose files were looked at, and whose weights are read on demand.

  `lm.module.apply({'params': lm.load(...)}, ids_BL)` runs it.

  Attributes:
    module: the Flax module.
    tokenizer: the model's own.
    identity: what makes its activations what they are: SHA-256 of `weights`,
      `config` and `tokenizer`, and `dtype`.
    shapes: of all parameters, by path.
    dtype: that parameters are given in.
  """

  module: Transformer
  tokenizer: Tokenizer
  identity: dict[str, Any]
  shapes: dict[str, tuple[int, ...]]
  dtype: np.dtype
  _sources: dict[str, tuple[Tensor, Callable[[np.ndarray], np.ndarray]]]

  def check_context_length(self, length: int) -> None:
    """Raises UserError where contexts are longer than the model can read."""
    if length > self.module.config.context:
      raise UserError(
        f'text.context_length: {length} is more than the language model takes, '
        f'{self.module.config.context}'
      )

  @property
  def bytes(self) -> int:
    """Of all parameters."""
    sizes = (np.prod(shape, dtype=np.int64) for shape in self.shapes.values())
    return int(sum(sizes)) * self.dtype.itemsize

  @functools.cached_property
  def params(self) -> dict[str, Any]:
    """All parameters, on the host."""
    return self.load()

  def load(
    self,
    place: Placement | None = None,
    *,
    blocks: int | None = None,
    put: Callable[[Any], Any] = lambda value: value,
  ) -> dict[str, Any]:
    """Reads parameters.

    Args:
      place: says where each is to lie; each device's part is read for itself.
        None leaves them on the host.
      blocks: read only what the first so many blocks need, which do not give
        logits; None is all.
      put: what to do with each before the next is read.

    Returns:
      a nested plain dictionary.
    """
    params: dict[str, Any] = {}
    for path, value in self.read(place, blocks=blocks):
      node = params
      *parents, leaf = path.split('/')
      for parent in parents:
        node = node.setdefault(parent, {})
      node[leaf] = put(value)
    return params

  def read(
    self, place: Placement | None = None, *, blocks: int | None = None
  ) -> Iterator[tuple[str, np.ndarray | jax.Array]]:
    """Yields path and value of one parameter after the other; see `load`.

    The host holds one of them at a time, beside what lies there to stay.
    """
    for path, shape in self.shapes.items():
      if blocks is not None and not is_below(path, blocks):
        continue
      tensor, orient = self._sources[path]
      view = orient(tensor.open())
      # A copy, so that no part of the mapped file stays.
      part = lambda index, v=view: np.array(v[index], self.dtype, order='C')
      if place is None:
        yield path, part(...)
      else:
        where = place(path, shape)
        yield path, jax.make_array_from_callback(shape, where, part)


def is_below(path: str, blocks: int) -> bool:
  """Whether a parameter is needed by the first blocks."""
  top = path.split('/')[0]
  if top.startswith('block_'):
    return int(top.removeprefix('block_')) < blocks
  return top in ('W_E', 'W_pos')


class Architecture(NamedTuple):
  """What a model's config.json says.

  Attributes:
    raw: the file.
    family: of `lm.families`.
    module: the Flax module.
    shapes: of all parameters, by path.
  """

  raw: dict[str, Any]
  family: ModuleType
  module: Transformer
  shapes: dict[str, tuple[int, ...]]


def read_architecture(folder: str) -> Architecture:
  """What the config.json of a folder says; no weights are needed.

  Raises:
    UserError: it is of an unknown family, or a field is missing or wrong.
  """
  file = os.path.join(folder, 'config.json')
  raw = read_json(file)
  if raw.get('quantization_config'):
    raise UserError(
      f'lm.path: {file} has a quantization_config; give the model in float32, '
      'float16 or bfloat16'
    )
  family = FAMILIES.get(raw.get('model_type'))
  if family is None:
    raise UserError(
      f'lm.path: {file} has model_type {raw.get("model_type")!r}; supported are '
      f'{", ".join(sorted(FAMILIES))}'
    )
  try:
    module = Transformer(family.config(raw))
    return Architecture(raw, family, module, parameter_shapes(module))
  except UserError:
    raise
  except KeyError as e:
    raise UserError(f'lm.path: {file} has no {e}') from e
  except (TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
    reason = str(e).splitlines()[0]
    raise UserError(f'lm.path: {file}: {reason}') from e


def load_language_model(
  path: str, *, revision: str | None, dtype: str
) -> LanguageModel:
  """Opens a language model.

  Args:
    path: a Hugging Face folder, a hub id such as 'org/name', or 'embedded'.
    revision: branch, tag or commit of a hub id; None is its default branch.
    dtype: 'float32' or 'bfloat16'; parameters and activations.

  Raises:
    UserError: a file is missing, truncated or of an unknown family; a tensor
      is missing, unexpected or misshapen.
  """
  folder = find_folder(path, revision)
  raw, family, module, shapes = read_architecture(folder)
  found, files = tensors_lib.find(folder)
  sources = _match(family, module, shapes, found, folder)
  tokenizer = Tokenizer(folder, module.config.vocabulary)
  identity = {
    'config': hashlib.sha256(
      json.dumps(raw, sort_keys=True).encode()
    ).hexdigest(),
    'weights': tensors_lib.digest(files),
    'tokenizer': tokenizer.digest,
    'dtype': dtype,
  }
  return LanguageModel(
    module, tokenizer, identity, shapes, np.dtype(DTYPES[dtype]), sources
  )


# Of a model on the hub, what is needed to run it.
_FILES = ('*.json', 'model*.safetensors')


def find_folder(
  path: str, revision: str | None, files: tuple[str, ...] = _FILES
) -> str:
  """Where a model is on this machine.

  Args:
    path: a Hugging Face folder, a hub id such as 'org/name', or 'embedded'.
    revision: branch, tag or commit of a hub id.
    files: patterns of what is downloaded of a hub id.

  Raises:
    UserError: there is none.
  """
  if path == 'embedded':
    return str(importlib.resources.files('gsae_jax.lm') / 'embedded')
  folder = os.path.expanduser(path)
  if os.path.isdir(folder):
    return folder
  if path.count('/') > 1 or path.startswith(('.', '/', '~')):
    raise UserError(f'lm.path: there is no folder {path}')
  import huggingface_hub

  try:
    return huggingface_hub.snapshot_download(
      path,
      revision=revision,
      allow_patterns=list(files),
      ignore_patterns=['*/*'],
    )
  except Exception as e:  # A dozen network and hub errors, all the same here.
    raise UserError(
      f'lm.path: {path!r} is neither a folder nor could it be downloaded '
      f'({type(e).__name__}); download it where there is a network and give '
      'the folder'
    ) from e


def parameter_shapes(module: Transformer) -> dict[str, tuple[int, ...]]:
  """The shape of every parameter by its path, without making any."""
  tree = jax.eval_shape(
    module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )['params']
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {'/'.join(k.key for k in path): leaf.shape for path, leaf in leaves}


def _match(
  family: ModuleType,
  module: Transformer,
  shapes: dict[str, tuple[int, ...]],
  found: dict[str, Tensor],
  folder: str,
) -> dict[str, tuple[Tensor, Callable[[np.ndarray], np.ndarray]]]:
  """Finds every parameter's tensor; none may be left over."""
  tensors = {}
  for name, tensor in found.items():
    renamed = family.rename(name)
    if renamed is not None:
      tensors[renamed] = name, tensor
  table = family.weights(module.config)
  sources = {}
  for path, shape in shapes.items():
    theirs, orient = table[path]
    if theirs not in tensors:
      raise UserError(f'lm.path: {folder} lacks the tensor {theirs}')
    name, tensor = tensors[theirs]
    tensor.check_dtype(name)
    try:
      got = orient(np.broadcast_to(np.int8(), tensor.shape)).shape
    except (ValueError, IndexError):
      got = None
    if got != shape:
      raise UserError(
        f'lm.path: {folder}: {name} has shape {tensor.shape}, which config.json '
        f'does not call for ({path} is {shape})'
      )
    sources[path] = tensor, orient
  known = {theirs for theirs, _ in table.values()}
  if module.config.tied_embeddings and 'lm_head.weight' in tensors:
    # Some are saved all the same.
    (head, saved), (embedding, _) = tensors['lm_head.weight'], sources['W_E']
    if not saved.equals(embedding):
      raise UserError(
        f'lm.path: {folder}: {head} differs from the embeddings, and config.json '
        'ties the two (tie_word_embeddings)'
      )
    known.add('lm_head.weight')
  left = sorted(name for key, (name, _) in tensors.items() if key not in known)
  if left:
    raise UserError(
      f'lm.path: {folder} has {len(left)} unexpected tensor(s), such as '
      f'{left[0]}'
    )
  return sources
