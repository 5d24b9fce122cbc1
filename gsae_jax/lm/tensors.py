"""The tensors of a model folder, each of which is read when it is asked for."""

import concurrent.futures
import dataclasses
import hashlib
import json
import os

import ml_dtypes
import numpy as np
import safetensors

from gsae_jax.errors import UserError
from gsae_jax.lm.tokenizer import read_json

_DTYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies.

  Attributes:
    path: of its file.
    dtype: of its numbers, in safetensors' words.
    shape: of the array, in C order.
    offset: bytes in front of it.
  """

  path: str
  dtype: str
  shape: tuple[int, ...]
  offset: int

  def check_dtype(self, name: str) -> None:
    """Raises UserError where its numbers are none that are read."""
    if self.dtype not in _DTYPES:
      raise UserError(
        f'lm.path: {self.path}: {name} is of {self.dtype}; supported are '
        f'{", ".join(_DTYPES)}'
      )

  def equals(self, other: 'Tensor') -> bool:
    """Whether another one has the same numbers."""
    if (self.dtype, self.shape) != (other.dtype, other.shape):
      return False
    a, b = self.open(), other.open()
    rows = range(0, self.shape[0], 4096)
    return all(np.array_equal(a[i : i + 4096], b[i : i + 4096]) for i in rows)

  def open(self) -> np.ndarray:
    """The array, mapped: what is never looked at is never read.

    What was read stays in memory until nobody holds the array or a view of it.
    """
    dtype = np.dtype(_DTYPES[self.dtype])
    if not np.prod(self.shape):
      return np.zeros(self.shape, dtype)
    return np.memmap(self.path, dtype, 'r', self.offset, self.shape)


def find(folder: str) -> tuple[dict[str, Tensor], list[str]]:
  """Every tensor of a folder's safetensors files by name, and the files.

  Raises:
    UserError: a file is missing or truncated, or two hold the same name.
  """
  index = os.path.join(folder, 'model.safetensors.index.json')
  names = ['model.safetensors']
  if os.path.exists(index):
    found = read_json(index).get('weight_map')
    if (
      not isinstance(found, dict)
      or not found
      or not all(isinstance(name, str) for name in found.values())
    ):
      raise UserError(f'lm.path: {index} has no weight_map')
    names = sorted(set(found.values()))
  elif not os.path.exists(os.path.join(folder, names[0])):
    torch_files = [n for n in os.listdir(folder) if n.endswith('.bin')]
    hint = ''
    if torch_files:
      hint = (
        f'; {torch_files[0]} is a pickle, which is never read: save the model '
        "with transformers' save_pretrained, which writes safetensors"
      )
    raise UserError(f'lm.path: {folder} has no model.safetensors{hint}')
  tensors = {}
  for name in names:
    path = os.path.join(folder, name)
    if not os.path.exists(path):
      raise UserError(f'lm.path: {folder} has no {name}')
    for key, tensor in _read_header(path).items():
      if key in tensors:
        raise UserError(f'lm.path: {folder} has {key} in two of its files')
      tensors[key] = tensor
  return tensors, [os.path.join(folder, name) for name in names]


def _read_header(path: str) -> dict[str, Tensor]:
  try:
    # The library checks that the header fits the file, byte by byte; where the
    # tensors lie it does not say.
    with safetensors.safe_open(path, framework='np'):
      pass
  except safetensors.SafetensorError as e:
    raise UserError(
      f'lm.path: {path} is truncated or not safetensors ({e}); copy or '
      'download it again'
    ) from e
  with open(path, 'rb') as f:
    size = int.from_bytes(f.read(8), 'little')
    header = json.loads(f.read(size))
  header.pop('__metadata__', None)
  return {
    key: Tensor(
      path,
      entry['dtype'],
      tuple(entry['shape']),
      8 + size + entry['data_offsets'][0],
    )
    for key, entry in header.items()
  }


def digest(paths: list[str]) -> str:
  """SHA-256 of the files' SHA-256, in order."""

  def one(path: str) -> bytes:
    with open(path, 'rb') as f:
      return hashlib.file_digest(f, 'sha256').digest()

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return hashlib.sha256(b''.join(pool.map(one, paths))).hexdigest()
