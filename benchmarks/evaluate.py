r"""Tokens per second of the evaluator, against the model's own forward passes.

  python -m benchmarks.evaluate        (about ten minutes)

The passes that an evaluation calls for, as anybody would make them: the clean one,
one with the site at zero, and one per SAE, whole and each with its cross-entropy.
The evaluator also runs the SAEs, finds means and a mean ablation, compares
distributions token by token, and adds up in float64; and it starts passes at the
site. `first` is a run's first checkpoint; `later` the others, where ablations are
known and one pass less is called for. Each is a process of its own, all on one
core, by turns; tokens count once a pass that is called for.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import comparison, record, turns
from benchmarks.products import PRODUCTS, command
from gsae_jax.evaluation.splice import Evaluator
from gsae_jax.lm.architecture import BlockConfig, TransformerConfig
from gsae_jax.lm.contexts import Contexts
from gsae_jax.lm.layouts import make_layout
from gsae_jax.lm.rotary import Rope
from gsae_jax.lm.transformer import Transformer
from gsae_jax.lm.weights import load_language_model
from gsae_jax.sae import ARCHITECTURES

SIDES = 'passes', 'first', 'later'


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


# Model, site, width, features, SAEs of each, contexts of a batch, batches.
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


def make_passes(lm, site, ids_NBL, count):
  """Whole passes, each with its cross-entropy; the first with the site at zero."""

  def loss(params, ids_BL, zero):
    edits = {site: jnp.zeros_like} if zero else {}
    logits, _ = lm.module.apply({'params': params}, ids_BL, edits=edits)
    log_p = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_p, ids_BL[:, 1:, None], -1))

  forward = jax.jit(loss, static_argnums=2)
  params = lm.load(put=lambda v: jax.device_put(v))

  def run():
    for batch in ids_NBL:
      forward(params, batch, True).block_until_ready()
      for _ in range(count - 1):
        forward(params, batch, False).block_until_ready()

  cost = forward.lower(params, ids_NBL[0], False).compile().cost_analysis()
  return run, cost['flops'] * count * len(ids_NBL)


def make_evaluator(lm, ids_CL, batch):
  rows, length = ids_CL.shape
  contexts = Contexts(
    ids_CL,
    (0,),
    'drop',
    np.arange(rows) * length,
    np.arange(rows, dtype=np.uint64),
  )
  layout = make_layout(
    'replicated', lm.module.config, lm.bytes, jax.devices()[:1], 1
  )
  return Evaluator(
    lm,
    contexts,
    tokens=ids_CL.size,
    batch_size=batch,
    parallel='auto',
    layout=layout,
  )


def make(case: str, side: str) -> turns.Side:
  """One side of one case."""
  make_model, site, width, sizes, each, shape, batches = CASES[case]
  lm = make_model()
  saes = make_saes(site, width, sizes, each)
  rng = np.random.default_rng(0)
  ids_NBL = rng.integers(
    1, lm.module.config.vocabulary, (batches, *shape), dtype=np.int32
  )
  count, flops = 2 + len(saes), None
  if side == 'passes':
    run, flops = make_passes(lm, site, ids_NBL, count)
  else:
    evaluator = make_evaluator(lm, ids_NBL.reshape(-1, shape[1]), shape[0])
    count -= side == 'later'

    def run():
      if side == 'first':  # Sites are new.
        for positions in evaluator._policies:
          positions.sites.clear()
      evaluator.run(saes)

  run()
  about = {'tokens': ids_NBL.size * count, 'flops': flops, 'case': case}
  return turns.Side(run, about)


def measure(case: str, args) -> turns.Measured:
  _, _, width, sizes, _, shape, _ = CASES[case]
  worker = sys.executable, '-m', 'benchmarks.evaluate'
  commands = {
    side: [*worker, f'--case={case}', f'--side={side}'] for side in SIDES
  }
  commands[PRODUCTS] = command(
    shape[0] * shape[1],
    width,
    max(sizes),
    device='cpu',
    times=1,
    gradient=False,
  )
  measured = turns.measure(commands, rounds=args.rounds, core=args.core)
  for name, reason in measured.failed.items():
    sys.exit(f'error: {case}, {name}: {reason}')
  return measured


def main():
  flags = record.parser(__doc__, rounds=5)
  flags.add_argument('--core', type=int, default=0, help='Of the CPU.')
  flags.add_argument('--only', default='', help="Part of a case's name.")
  flags.add_argument('--case', choices=CASES, help='For workers.')
  flags.add_argument('--side', choices=SIDES, help='For workers.')
  args = flags.parse_args()
  if args.case:
    return turns.serve(lambda: make(args.case, args.side))
  for case in CASES:
    if args.only in case:
      found, _, busy = measure(case, args)
      rows = comparison.make_rows(found, tokens=0)
      settings = {'case': case, 'rounds': args.rounds, 'core': args.core}
      record.append(
        args.results, 'evaluate', settings=settings, rows=rows, others_busy=busy
      )
      print(f'\n{case}\n\n{comparison.table(rows, ["passes"])}', flush=True)
      comparison.warn(busy)


if __name__ == '__main__':
  main()
