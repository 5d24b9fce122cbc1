"""Reads a language model: config.json, safetensors, tokenizer.json."""

import dataclasses
import hashlib
import importlib.resources
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors

from gsae_jax.errors import UserError
from gsae_jax.lm.families import FAMILIES
from gsae_jax.lm.tokenizer import Tokenizer, read_json
from gsae_jax.lm.transformer import Transformer

DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A model ready to run: `lm.module.apply({'params': lm.params}, ids_BL)`.

  Attributes:
    module: the Flax module.
    params: nested plain dictionary of host arrays in the dtype asked for.
    tokenizer: the model's own.
    identity: what makes its activations what they are: SHA-256 of `weights`,
      `config` and `tokenizer`, and `dtype`.
  """

  module: Transformer
  params: dict[str, Any]
  tokenizer: Tokenizer
  identity: dict[str, Any]

  def check_context_length(self, length: int) -> None:
    """Raises UserError where contexts are longer than the model can read."""
    if length > self.module.config.context:
      raise UserError(
        f'text.context_length: {length} is more than the language model takes, '
        f'{self.module.config.context}'
      )


def load_language_model(
  path: str, *, revision: str | None, dtype: str
) -> LanguageModel:
  """Loads a language model.

  Args:
    path: a Hugging Face folder, a hub id such as 'org/name', or 'embedded'.
    revision: branch, tag or commit of a hub id; None is its default branch.
    dtype: 'float32' or 'bfloat16'; parameters and activations.

  Raises:
    UserError: a file is missing, truncated or of an unknown family; a tensor
      is missing, unexpected or misshapen.
  """
  folder = _folder(path, revision)
  raw = read_json(os.path.join(folder, 'config.json'))
  family = FAMILIES.get(raw.get('model_type'))
  if family is None:
    raise UserError(
      f'lm.path: {folder}/config.json has model_type '
      f'{raw.get("model_type")!r}; supported are {", ".join(sorted(FAMILIES))}'
    )
  try:
    config = family.config(raw)
  except KeyError as e:
    raise UserError(f'lm.path: {folder}/config.json has no {e}') from e
  except (TypeError, AttributeError) as e:
    raise UserError(f'lm.path: {folder}/config.json: {e}') from e
  tensors, digest = _read_tensors(folder)
  params = {}
  for ours, (theirs, orient) in family.weights(config).items():
    if theirs not in tensors:
      raise UserError(f'lm.path: {folder} lacks the tensor {theirs}')
    value = orient(tensors.pop(theirs))
    node = params
    *parents, leaf = ours.split('/')
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value.astype(DTYPES[dtype])
  # Buffers that older checkpoints carry and that are functions of the config.
  unknown = [
    k for k in sorted(tensors) if not k.endswith('rotary_emb.inv_freq')
  ]
  if config.tied_embeddings:
    unknown = [k for k in unknown if k != 'lm_head.weight']
  if unknown:
    raise UserError(f'lm.path: {folder} has an unexpected tensor {unknown[0]}')
  tokenizer = Tokenizer(folder)
  if tokenizer.largest_id >= config.vocabulary:
    raise UserError(
      f'lm.path: the tokenizer in {folder} has ids up to '
      f'{tokenizer.largest_id}, and the model {config.vocabulary} embeddings; '
      "put the model's own tokenizer.json there"
    )
  module = Transformer(config)
  _check_shapes(module, params, folder)
  identity = {
    'config': hashlib.sha256(
      json.dumps(raw, sort_keys=True).encode()
    ).hexdigest(),
    'weights': digest,
    'tokenizer': tokenizer.digest,
    'dtype': dtype,
  }
  return LanguageModel(module, params, tokenizer, identity)


def _folder(path: str, revision: str | None) -> str:
  if path == 'embedded':
    return str(importlib.resources.files('gsae_jax.lm') / 'embedded')
  folder = os.path.expanduser(path)
  if os.path.isdir(folder):
    return folder
  if path.count('/') != 1 or path.startswith(('.', '/', '~')):
    raise UserError(f'lm.path: there is no folder {path}')
  import huggingface_hub

  try:
    return huggingface_hub.snapshot_download(
      path,
      revision=revision,
      allow_patterns=['*.json', '*.safetensors'],
    )
  except Exception as e:  # A dozen network and hub errors, all the same here.
    raise UserError(
      f'lm.path: {path!r} is neither a folder nor could it be downloaded '
      f'({type(e).__name__}); download it where there is a network and give '
      'the folder'
    ) from e


def _read_tensors(folder: str) -> tuple[dict[str, np.ndarray], str]:
  """Every tensor of the folder's safetensors files, and a SHA-256 of them."""
  index = os.path.join(folder, 'model.safetensors.index.json')
  if os.path.exists(index):
    names = sorted(set(read_json(index).get('weight_map', {}).values()))
  else:
    names = ['model.safetensors']
  tensors = {}
  digest = hashlib.sha256()
  for name in names:
    path = os.path.join(folder, name)
    if not os.path.exists(path):
      raise UserError(f'lm.path: {folder} has no {name}')
    try:
      with safetensors.safe_open(path, framework='np') as f:
        for key in f.keys():  # noqa: SIM118 -- not a dictionary.
          tensors[key] = f.get_tensor(key)
    except safetensors.SafetensorError as e:
      raise UserError(
        f'lm.path: {path} is truncated or not safetensors ({e}); copy or '
        'download it again'
      ) from e
    with open(path, 'rb') as f:
      digest.update(hashlib.file_digest(f, 'sha256').digest())
  return tensors, digest.hexdigest()


def _check_shapes(module: Transformer, params: dict, folder: str) -> None:
  want = jax.eval_shape(
    module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )['params']
  want = jax.tree_util.tree_flatten_with_path(want)[0]
  have = dict(jax.tree_util.tree_flatten_with_path(params)[0])
  for key, shape in want:
    name = '/'.join(k.key for k in key)
    if have[key].shape != shape.shape:
      raise UserError(
        f'lm.path: {folder}: {name} has shape {have[key].shape}, and '
        f'config.json calls for {shape.shape}'
      )
