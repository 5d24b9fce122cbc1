r"""Tokens per second of harvesting, against PyTorch stopped behind the same layer.

  python -m benchmarks.harvest            (needs torch; about two minutes)

A Pythia-shaped model: 6 layers, width 512, 8 heads, vocabulary 50304; 8 contexts
of 256 tokens, float32, the residual stream behind the third layer. PyTorch runs
transformers' model and leaves it by an exception in a hook, which is what
SAELens and dictionary_learning do in effect. On CPU every side is a process of
its own on one core with one thread, with malloc told to keep its memory; they
take turns, and what is given is the median of the ratios of rounds. With
--device=gpu both run on the GPU in bfloat16, 64 contexts of 1024.
"""

import os
import sys
import tempfile

import numpy as np

from benchmarks import comparison, record, turns
from benchmarks.products import PRODUCTS, command

SHAPE = {
  'vocab_size': 50304,
  'hidden_size': 512,
  'num_hidden_layers': 6,
  'num_attention_heads': 8,
  'intermediate_size': 2048,
  'max_position_embeddings': 2048,
  'rotary_pct': 0.25,
  'bos_token_id': 0,
  'eos_token_id': 0,
}
LAYER = 2
CONTEXTS = {'cpu': (8, 256), 'gpu': (64, 1024)}


def parse():
  flags = record.parser(__doc__, rounds=11)
  flags.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
  flags.add_argument('--core', type=int, default=0, help='Of the CPU.')
  flags.add_argument('--worker', choices=('gsae_jax', 'torch'))
  flags.add_argument('--folder', help='Of the model; for workers.')
  return flags.parse_args()


def make_model(folder):
  import tokenizers
  import torch
  import transformers

  torch.manual_seed(0)
  transformers.utils.logging.disable_progress_bar()
  config = transformers.GPTNeoXConfig(**SHAPE)
  transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
  words = tokenizers.models.WordLevel({'a': 0}, 'a')
  tokenizers.Tokenizer(words).save(os.path.join(folder, 'tokenizer.json'))


def make_ids(device):
  rng = np.random.default_rng(0)
  return rng.integers(0, 50304, CONTEXTS[device]).astype(np.int32)


def ours(args):
  """One pass as harvest makes it: token ids in, rows on the host out."""
  import jax

  from gsae_jax.activations.forward import make_forward
  from gsae_jax.lm.layouts import make_layout
  from gsae_jax.lm.weights import load_language_model

  dtype = 'float32' if args.device == 'cpu' else 'bfloat16'
  lm = load_language_model(args.folder, revision=None, dtype=dtype)
  config = lm.module.config
  layout = make_layout('replicated', config, lm.bytes, jax.devices()[:1], 1)
  site = f'resid_post.{LAYER}'
  params = lm.load(layout.place, blocks=config.blocks_for((site,)))
  forward = make_forward(lm.module, layout, (site,))
  given = params, make_ids(args.device), {site: None}
  cost = forward.lower(*given, dtype=dtype).compile().cost_analysis()
  run = lambda: jax.device_get(forward(*given, dtype=dtype)[site])
  return run, cost['flops'], jax.devices()[0].device_kind


def theirs(args):
  import torch
  import transformers
  from torch.utils.flop_counter import FlopCounterMode

  if args.device == 'cpu':
    torch.set_num_threads(1)
  device = 'cuda' if args.device == 'gpu' else 'cpu'
  dtype = torch.float32 if args.device == 'cpu' else torch.bfloat16
  model = transformers.GPTNeoXForCausalLM.from_pretrained(
    args.folder, dtype=dtype, attn_implementation='sdpa'
  ).to(device)
  model.eval()
  ids = torch.from_numpy(make_ids(args.device)).long().to(device)
  found = []

  class Left(Exception):
    pass

  def hook(module, inputs, output):
    found.append(output[0] if isinstance(output, tuple) else output)
    raise Left

  model.gpt_neox.layers[LAYER].register_forward_hook(hook)

  def run():
    found.clear()
    with torch.no_grad():
      try:
        model(ids, use_cache=False)
      except Left:
        pass
    return found[0].float().cpu().numpy()

  with FlopCounterMode(display=False) as counter:
    run()
  name = torch.cuda.get_device_name() if args.device == 'gpu' else 'cpu'
  return run, counter.get_total_flops(), name


def make(args) -> turns.Side:
  run, flops, device = {'gsae_jax': ours, 'torch': theirs}[args.worker](args)
  sample = np.asarray(run(), np.float64).ravel()[::1009]
  return turns.Side(
    run, {'flops': flops, 'device': device, 'sample': sample.tolist()}
  )


def measure(args):
  """What came of the turns."""
  tokens = np.prod(CONTEXTS[args.device]).item()
  sizes = tokens, SHAPE['hidden_size'], SHAPE['intermediate_size']
  with tempfile.TemporaryDirectory() as folder:
    make_model(folder)
    flags = f'--folder={folder}', f'--device={args.device}'
    worker = sys.executable, '-m', 'benchmarks.harvest', *flags
    commands = {
      name: [*worker, f'--worker={name}'] for name in ('gsae_jax', 'torch')
    }
    commands[PRODUCTS] = command(
      *sizes, device=args.device, times=1, gradient=False
    )
    measured = turns.measure(
      commands,
      rounds=args.rounds,
      core=args.core if args.device == 'cpu' else None,
    )
  for name, reason in measured.failed.items():
    sys.exit(f'error: {name}: {reason.removeprefix("error: ")}')
  return measured


def main():
  args = parse()
  if args.worker:
    return turns.serve(lambda: make(args))
  found, _, busy = measure(args)
  tokens = np.prod(CONTEXTS[args.device]).item()
  sample, other = (
    np.array(found[k].pop('sample')) for k in ('gsae_jax', 'torch')
  )
  error = np.abs(sample - other).max() / np.abs(other).max()
  rows = comparison.make_rows(found, tokens=tokens)
  settings = {'device': args.device, 'contexts': CONTEXTS[args.device]}
  if args.device == 'cpu':
    settings['core'] = args.core
  record.append(
    args.results,
    'harvest',
    settings=settings | {'rounds': args.rounds},
    rows=rows,
    hardware=comparison.accelerators(rows),
    largest_difference=error,
    others_busy=busy,
  )
  print(comparison.table(rows, ['torch']))
  comparison.warn(busy)
  print(f'\nlargest difference of activations: {error:.1e}')


if __name__ == '__main__':
  main()
