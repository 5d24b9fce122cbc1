r"""Trains the embedded language model on this Python's own source files.

  python -m gsae_jax.lm.embedded.make --out=/tmp/embedded

Writes config.json, model.safetensors, tokenizer.json, tokenizer_config.json
and results.json (cross-entropies on held-out files, with baselines). The files
beside this script were made by it; README.md holds the figures.
"""

import collections
import json
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import tokenizers
from absl import app, flags

from gsae_jax.lm import text
from gsae_jax.lm.families import gelu_1l
from gsae_jax.lm.tokenizer import Tokenizer
from gsae_jax.lm.transformer import Transformer

BOS = '<|bos|>'
HELD_OUT = 0.1  # As in experiments/quickstart.py.
CONFIG: dict[str, Any] = {
  'model_type': gelu_1l.MODEL_TYPES[0],
  'n_layers': 1,
  'd_model': 128,
  'n_heads': 4,
  'd_head': 32,
  'd_mlp': 512,
  'd_vocab': 2048,
  'n_ctx': 128,
  'eps': 1e-5,
}


def make_tokenizer(texts, folder: str) -> Tokenizer:
  """Trains byte-level BPE; writes it to `folder` and reads it back."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=CONFIG['d_vocab'],
    special_tokens=[BOS],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator(texts, trainer)
  model.save(os.path.join(folder, 'tokenizer.json'))
  with open(os.path.join(folder, 'tokenizer_config.json'), 'w') as f:
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': BOS}
    json.dump(settings, f, indent=1)
  return Tokenizer(folder)


def all_contexts(texts, tokenizer: Tokenizer) -> text.Contexts:
  """Every full context of the texts."""
  return text.pack(
    texts,
    tokenizer,
    context_length=CONFIG['n_ctx'],
    packing='stream',
    prepend_bos=True,
    special_tokens='drop',
    rows=None,
  )


def losses(params, module: Transformer, ids_BL: jax.Array) -> jax.Array:
  """Cross-entropy in nats at each position but the last, `[B, L - 1]`."""
  logits_BLV, _ = module.apply({'params': params}, ids_BL)
  return optax.softmax_cross_entropy_with_integer_labels(
    logits_BLV[:, :-1], ids_BL[:, 1:]
  )


def train(
  module: Transformer, ids_CL: np.ndarray, steps: int, batch: int, rate: float
) -> dict:
  """AdamW on random contexts; returns the parameters."""
  tx = optax.adamw(
    optax.warmup_cosine_decay_schedule(0.0, rate, 200, steps, rate / 10),
    b2=0.98,
    weight_decay=0.1,
  )

  @jax.jit
  def step(params, opt_state, ids_BL):
    loss = lambda p: jnp.mean(losses(p, module, ids_BL))
    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  params = module.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))[
    'params'
  ]
  opt_state = tx.init(params)
  order = np.random.default_rng(0)
  for i in range(steps):
    batch_BL = ids_CL[order.integers(0, len(ids_CL), batch)]
    params, opt_state, value = step(params, opt_state, batch_BL)
    if i % 200 == 0 or i == steps - 1:
      print(f'step {i}: {float(value):.4f} nats/token', flush=True)
  return jax.device_get(params)


def baselines(train_ids: np.ndarray, held: text.Contexts) -> dict[str, float]:
  """Held-out cross-entropy of add-one unigrams, and of bigrams over them."""
  V = CONFIG['d_vocab']
  unigram = np.bincount(train_ids[:, 1:].ravel(), minlength=V) + 1.0
  p_unigram = unigram / unigram.sum()
  pairs = collections.Counter(
    (train_ids[:, :-1].astype(np.int64) * V + train_ids[:, 1:]).ravel().tolist()
  )
  first = np.bincount(train_ids[:, :-1].ravel(), minlength=V)
  mask = held.mask_CL[:, :-1]
  before = held.ids_CL[:, :-1][mask].astype(np.int64)
  after = held.ids_CL[:, 1:][mask]
  seen = np.array([pairs.get(k, 0) for k in (before * V + after).tolist()])
  # Dirichlet smoothing towards the unigrams, with the weight of 20 tokens.
  p_bigram = (seen + 20 * p_unigram[after]) / (first[before] + 20)
  return {
    'unigram_nats_per_token': float(-np.log(p_unigram[after]).mean()),
    'bigram_nats_per_token': float(-np.log(p_bigram).mean()),
  }


def evaluate(
  params, module, held: text.Contexts, tokenizer
) -> dict[str, float]:
  """Cross-entropy of the predictions made at positions that count."""
  run = jax.jit(lambda params, ids: losses(params, module, ids))
  total = 0.0
  count = 0
  text_bytes = 0
  for start in range(0, len(held.ids_CL), 64):
    ids = held.ids_CL[start : start + 64]
    mask = held.mask_CL[start : start + 64, :-1]
    total += float((np.asarray(run(params, ids), np.float64) * mask).sum())
    count += int(mask.sum())
    targets = [row[1:][m] for row, m in zip(ids, mask, strict=True)]
    text_bytes += sum(len(tokenizer.decode(t).encode()) for t in targets)
  return {
    'held_out_predictions': count,
    'held_out_bytes': text_bytes,
    'nats_per_token': total / count,
    'bits_per_byte': total / math.log(2) / text_bytes,
  }


def define_flags(values: flags.FlagValues) -> None:
  """Adds the flags of this command."""
  flags.DEFINE_string(
    'out', None, 'Folder to write.', required=True, flag_values=values
  )
  flags.DEFINE_integer('steps', 4000, 'Optimizer steps.', flag_values=values)
  flags.DEFINE_integer('batch', 32, 'Contexts per step.', flag_values=values)
  flags.DEFINE_float(
    'learning_rate', 4e-3, 'Peak, cosine to a tenth.', flag_values=values
  )


def main(given: flags.FlagValues) -> None:
  os.makedirs(given.out, exist_ok=True)
  documents = text.read_documents('stdlib', None)
  texts = text.split(documents, HELD_OUT, 'train')
  tokenizer = make_tokenizer(texts, given.out)
  ids_CL = all_contexts(texts, tokenizer).ids_CL
  held = all_contexts(text.split(documents, HELD_OUT, 'held_out'), tokenizer)
  module = Transformer(gelu_1l.config(CONFIG))
  params = train(module, ids_CL, given.steps, given.batch, given.learning_rate)
  results = {
    'documents': len(documents.texts),
    'text_digest': documents.digest,
    'training_tokens': int(ids_CL.size),
    'steps': given.steps,
    'visited_tokens': given.steps * given.batch * CONFIG['n_ctx'],
    **evaluate(params, module, held, tokenizer),
    **baselines(ids_CL, held),
  }
  flat = {
    '/'.join(k.key for k in key): value
    for key, value in jax.tree_util.tree_flatten_with_path(params)[0]
  }
  heads = (CONFIG['n_heads'], CONFIG['d_head'], CONFIG['d_model'])
  tensors = {}
  for ours, (theirs, _) in gelu_1l.weights(module.config).items():
    value = flat[ours]
    if value.ndim == 3:  # [D, H, K] here, [H, D, K] in TransformerLens.
      value = value.transpose(1, 0, 2)
    elif theirs.endswith('W_O'):
      value = value.reshape(heads)
    tensors[theirs] = np.ascontiguousarray(value)
  safetensors.numpy.save_file(
    tensors, os.path.join(given.out, 'model.safetensors')
  )
  for name, value in (('config', CONFIG), ('results', results)):
    with open(os.path.join(given.out, f'{name}.json'), 'w') as f:
      json.dump(value, f, indent=1)
      f.write('\n')
  print(json.dumps(results, indent=1))


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  app.run(lambda argv: main(flags.FLAGS))
