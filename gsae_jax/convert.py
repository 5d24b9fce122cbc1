r"""Turns a TransformerLens checkpoint, such as GELU-1L's, into a model folder.

  python -m gsae_jax.convert --checkpoint=model_final.pth --model_config=config.json \
      --tokenizer=DIR --out=DIR

GELU-1L (Nanda 2022) is published as a PyTorch file. This reads it with
`weights_only=True`, which runs no code of the file, and needs
`pip install 'gsae_jax[torch]'`; nothing else does. `--tokenizer` is a folder with
the tokenizer.json that the config names.
"""

import json
import os
import shutil

import numpy as np
import safetensors.numpy
from absl import flags

from gsae_jax import program
from gsae_jax.errors import UserError
from gsae_jax.lm.families import gelu_1l
from gsae_jax.lm.tokenizer import read_json

_COPIED = (
  'd_model',
  'd_mlp',
  'd_head',
  'd_vocab',
  'n_layers',
  'n_heads',
  'n_ctx',
)
_SUPPORTED = {
  'act_fn': 'gelu',
  'normalization': 'LN',
  'attn_only': False,
  'shortformer_pos': False,
}
# The causal mask and the score of what it hides.
_BUFFERS = ('.attn.mask', '.attn.IGNORE')


def convert_config(raw: dict) -> dict:
  """TransformerLens's config.json as ours.

  Raises:
    UserError: the model is of another kind, or a field is missing.
  """
  raw = {'normalization': raw.get('normalization_type', 'LN')} | raw
  for name, want in _SUPPORTED.items():
    if raw.get(name, want) != want:
      raise UserError(
        f'--model_config: {name} is {raw[name]!r}; supported is {want!r}'
      )
  missing = [name for name in _COPIED if name not in raw]
  if missing:
    raise UserError(f'--model_config: {missing[0]} is missing')
  config = {name: raw[name] for name in _COPIED}
  return config | {'model_type': 'gelu_1l', 'eps': raw.get('eps', 1e-5)}


def read_checkpoint(path: str) -> dict[str, np.ndarray]:
  """The parameters of a PyTorch file, as float32.

  Raises:
    UserError: PyTorch is missing, or the file is no dictionary of tensors.
  """
  try:
    import torch
  except ImportError as e:
    raise UserError(
      "--checkpoint: PyTorch reads it; pip install 'gsae_jax[torch]'"
    ) from e
  try:
    state = torch.load(path, map_location='cpu', weights_only=True)
  except OSError:
    raise
  except Exception as e:
    reason = str(e).splitlines()[0]
    raise UserError(
      f'--checkpoint: {path} is not a file of tensors alone ({reason})'
    ) from e
  if not isinstance(state, dict):
    raise UserError(f'--checkpoint: {path} is not a dictionary of tensors')
  return {
    name: value.float().numpy()
    for name, value in state.items()
    if not name.endswith(_BUFFERS)
  }


def define_flags(values: flags.FlagValues) -> None:
  """Adds the flags of this command."""
  required = {
    'checkpoint': 'The .pth file.',
    'model_config': 'The config.json of the checkpoint.',
    'tokenizer': 'Folder with a tokenizer.json.',
    'out': 'Folder to write; it must be new.',
  }
  for name, help_text in required.items():
    flags.DEFINE_string(name, None, help_text, flag_values=values)
  flags.mark_flags_as_required(list(required), values)


def main(given: flags.FlagValues) -> int:
  out = given.out
  try:
    raw = read_json(given.model_config)
  except UserError as e:  # Which speaks of a model's folder.
    raise UserError(
      f'--model_config: {str(e).removeprefix("lm.path: ")}'
    ) from e
  config = convert_config(raw)
  tokenizer = os.path.join(given.tokenizer, 'tokenizer.json')
  if not os.path.exists(tokenizer):
    raise UserError(f'--tokenizer: {given.tokenizer} has no tokenizer.json')
  if os.path.exists(out):
    raise UserError(f'--out: {out} is there already; give a new folder')
  tensors = read_checkpoint(given.checkpoint)
  config['unembed_bias'] = 'unembed.b_U' in tensors
  wanted = {
    name for name, _ in gelu_1l.weights(gelu_1l.config(config)).values()
  }
  if wanted != set(tensors):
    missing, left = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
    what = f'lacks {missing[0]}' if missing else f'has an unknown {left[0]}'
    raise UserError(f'--checkpoint: {given.checkpoint} {what}')
  partial = f'{out}.partial'
  shutil.rmtree(partial, ignore_errors=True)
  os.makedirs(partial)
  contiguous = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
  safetensors.numpy.save_file(
    contiguous, os.path.join(partial, 'model.safetensors')
  )
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    source = os.path.join(given.tokenizer, name)
    if os.path.exists(source):
      shutil.copy(source, partial)
  with open(os.path.join(partial, 'config.json'), 'w') as f:
    json.dump(config, f, indent=1)
  os.rename(partial, out)
  print(f'{len(tensors)} tensors in {out}')
  return 0


COMMAND = program.Command(define_flags, main)

if __name__ == '__main__':
  COMMAND.run()
