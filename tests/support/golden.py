"""Models whose weights are a function of their names, and what PyTorch made of them.

`families.json` has configs and shapes, `families.safetensors` the logits and last
residual streams of transformers' PyTorch: families are checked where it is not.
"""

import json

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from tests.support.locations import ROOT

FOLDER = ROOT / 'tests' / 'golden'


def make_tensors(shapes, model_type):
  """Random weights; norms scale by about one, so that nothing vanishes."""
  scale = 0.0 if model_type.startswith('gemma') else 1.0  # Gemma adds one.
  tensors = {}
  for i, (name, shape) in enumerate(sorted(shapes.items())):
    value = 0.3 * np.random.default_rng((7, i)).normal(size=shape)
    is_norm = len(shape) == 1 and name.endswith('weight')
    tensors[name] = (value + scale * is_norm).astype(np.float32)
  return tensors


def write_tokenizer(folder, vocabulary):
  words = tokenizers.models.WordLevel(
    {f'w{i}': i for i in range(vocabulary)}, 'w0'
  )
  tokenizers.Tokenizer(words).save(str(folder / 'tokenizer.json'))


# One configuration of each family, where what a test shows is the family's.
OF_FAMILIES = (
  'gpt2',
  'neox',
  'llama',
  'mistral',
  'qwen2',
  'qwen3_flags',
  'gemma',
  'gemma2',
  'gemma3_scaled',
)


def marked_cases(mark, but=OF_FAMILIES):
  """Parameters: the names of all configurations, with a mark where not in `but`."""
  return [
    pytest.param(name, marks=() if name in but else mark)
    for name in read_cases()
  ]


def read_cases():
  return json.loads((FOLDER / 'families.json').read_text())


def write_model(folder, name):
  """A model folder as transformers would have saved it; returns its config."""
  case = read_cases()[name]
  (folder / 'config.json').write_text(json.dumps(case['config']))
  tensors = make_tensors(case['shapes'], case['config']['model_type'])
  save_file(tensors, folder / 'model.safetensors')
  write_tokenizer(folder, case['config']['vocab_size'])
  return case['config']
