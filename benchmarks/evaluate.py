r"""Tokens per second of the evaluator, against the model's own forward passes.

  taskset -c 0 python benchmarks/evaluate.py        (about three minutes)

The passes that an evaluation calls for, as anybody would make them: the clean one,
one with the site at zero, and one per SAE, whole and each with its cross-entropy.
The evaluator also runs the SAEs, finds means and a mean ablation, compares
distributions token by token, and adds up in float64; and it starts passes at the
site. Processor time of one core, by turns; medians of rounds.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax.evaluation.splice import Evaluator
from gsae_jax.lm.architecture import BlockConfig, TransformerConfig
from gsae_jax.lm.contexts import Contexts
from gsae_jax.lm.layouts import make_layout
from gsae_jax.lm.rotary import Rope
from gsae_jax.lm.transformer import Transformer
from gsae_jax.lm.weights import load_language_model
from gsae_jax.sae import ARCHITECTURES


class RandomModel:
  """As much of a `LanguageModel` as the evaluator needs: six layers, width 512."""

  def __init__(self):
    block = BlockConfig(
      rope=Rope(tuple(1e4 ** (-np.arange(32) / 32))), window=None, scale=0.125
    )
    self.module = Transformer(
      TransformerConfig(
        blocks=(block,) * 6, width=512, heads=8, kv_heads=8, head_width=64,
        mlp_width=2048, vocabulary=50304, context=256, norm='rmsnorm',
        norm_eps=1e-5, activation='gelu', gated_mlp=False,
        tied_embeddings=False,
      )
    )  # fmt: skip
    ids = jnp.zeros((1, 8), jnp.int32)
    self.params = self.module.init(jax.random.key(0), ids)['params']
    self.bytes = sum(p.nbytes for p in jax.tree.leaves(self.params))

  def load(self, place=None, *, put=None):
    del place
    return jax.tree.map(lambda p: put(np.asarray(p)), self.params)


CASES = {
  'embedded, mlp_out.0, 5 x 512 and 5 x 768 features': (
    lambda: load_language_model('embedded', revision=None, dtype='float32'),
    'mlp_out.0', 128, (512, 768), 5, (32, 128), 4,
  ),
  'six layers, resid_post.2, 4 x 4096 features': (
    RandomModel, 'resid_post.2', 512, (4096,), 4, (8, 128), 2,
  ),
  'six layers, resid_post.2, 4 x 16384 features': (
    RandomModel, 'resid_post.2', 512, (16384,), 4, (8, 128), 2,
  ),
}  # fmt: skip


def make_saes(site, width, sizes, each):
  saes = {}
  for features in sizes:
    module = ARCHITECTURES['gated'](width, features)
    params = module.init(jax.random.key(0), jnp.zeros((1, width)))['params']
    params = jax.tree.map(np.asarray, params)
    params['b_gate'] = params['b_gate'] - 0.2
    for i in range(each):
      saes[f'{features}_{i}'] = module, site, params
  return saes


def make_forward(lm, site):
  """A whole pass with its cross-entropy, and the same with the site at zero."""

  def loss(params, ids_BL, zero):
    edits = {site: jnp.zeros_like} if zero else {}
    logits, _ = lm.module.apply({'params': params}, ids_BL, edits=edits)
    log_p = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_p, ids_BL[:, 1:, None], -1))

  return jax.jit(loss, static_argnums=2)


def measure(case, rounds):
  make, site, width, sizes, each, shape, batches = CASES[case]
  lm = make()
  saes = make_saes(site, width, sizes, each)
  rng = np.random.default_rng(0)
  count = shape[0] * batches
  ids_CL = rng.integers(
    1, lm.module.config.vocabulary, (count, shape[1]), dtype=np.int32
  )
  starts_R = np.arange(count) * shape[1]
  contexts = Contexts(
    ids_CL, (0,), 'drop', starts_R, np.arange(count, dtype=np.uint64)
  )
  layout = make_layout(
    'replicated', lm.module.config, lm.bytes, jax.devices()[:1], 1
  )
  make_evaluator = lambda: Evaluator(
    lm,
    contexts,
    tokens=ids_CL.size,
    batch_size=shape[0],
    parallel='auto',
    layout=layout,
  )
  forward = make_forward(lm, site)
  params = lm.load(put=lambda v: jax.device_put(v))

  def passes():
    for batch in ids_CL.reshape(batches, *shape):
      forward(params, batch, True).block_until_ready()
      for _ in range(1 + len(saes)):
        forward(params, batch, False).block_until_ready()

  evaluator = make_evaluator()

  def evaluate():
    # As at a run's first checkpoint: sites are new.
    for positions in evaluator._policies:
      positions.sites.clear()
    evaluator.run(saes)

  def again():
    evaluator.run(saes)

  seconds = {passes: [], evaluate: [], again: []}
  for _ in range(rounds + 1):
    for run, found in seconds.items():
      start = time.process_time()
      run()
      found.append(time.process_time() - start)
  passes_, first, later = (np.array(s[1:]) for s in seconds.values())
  ratio = statistics.median(passes_ / first)
  # No ablation is called for any more.
  share = (1 + len(saes)) / (2 + len(saes))
  ratio_later = statistics.median(share * passes_ / later)
  made = ids_CL.size * (2 + len(saes))
  print(
    f'| {case} | {made / np.median(passes_):,.0f} '
    f'| {made / np.median(first):,.0f} | **{ratio:.2f}** '
    f'| **{ratio_later:.2f}** |',
    flush=True,
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  print(
    '| | forward passes, tokens/s | evaluator | ratio, first checkpoint '
    '| later ones |'
  )
  print('|---|---|---|---|---|')
  for case in CASES:
    measure(case, args.rounds)


if __name__ == '__main__':
  main()
