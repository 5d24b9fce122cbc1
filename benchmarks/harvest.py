r"""Tokens per second of harvesting, against PyTorch stopped behind the same layer.

  python benchmarks/harvest.py            (needs torch; about two minutes)

A Pythia-shaped model: 6 layers, width 512, 8 heads, vocabulary 50304; 8 contexts
of 256 tokens, float32, the residual stream behind the third layer. PyTorch runs
transformers' model and leaves it by an exception in a hook, which is what
SAELens and dictionary_learning do in effect. On CPU every side is a process of
its own on one core with one thread, with malloc told to keep its memory; they
take turns, and what is given is the median of the ratios of rounds. With
--device=gpu both run on the GPU in bfloat16, 64 contexts of 1024.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

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


def parse():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
  parser.add_argument('--rounds', type=int, default=11)
  parser.add_argument('--worker', choices=('gsae_jax', 'torch'))
  parser.add_argument('--folder')
  return parser.parse_args()


def make_model(folder):
  import tokenizers
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.GPTNeoXConfig(**SHAPE)
  transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
  words = tokenizers.models.WordLevel({'a': 0}, 'a')
  tokenizers.Tokenizer(words).save(os.path.join(folder, 'tokenizer.json'))


def make_ids(args):
  import numpy as np

  shape = (8, 256) if args.device == 'cpu' else (64, 1024)
  return np.random.default_rng(0).integers(0, 50304, shape).astype(np.int32)


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
  ids = make_ids(args)
  run = lambda: forward(params, ids, {site: None}, dtype=dtype)[site]
  return lambda: jax.device_get(run())


def theirs(args):
  import torch
  import transformers

  if args.device == 'cpu':
    torch.set_num_threads(1)
  device = 'cuda' if args.device == 'gpu' else 'cpu'
  dtype = torch.float32 if args.device == 'cpu' else torch.bfloat16
  model = transformers.GPTNeoXForCausalLM.from_pretrained(
    args.folder, dtype=dtype, attn_implementation='sdpa'
  ).to(device)
  model.eval()
  ids = torch.from_numpy(make_ids(args)).long().to(device)
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

  return run


def work(args):
  """Answers every line on standard input with the seconds of one pass."""
  import numpy as np

  run = {'gsae_jax': ours, 'torch': theirs}[args.worker](args)
  sample = np.asarray(run(), np.float64).ravel()[::1009]
  print(json.dumps(sample.tolist()), flush=True)
  # One thread: what other programs do meanwhile does not count.
  clock = time.process_time if args.device == 'cpu' else time.perf_counter
  for _ in sys.stdin:
    start = clock()
    run()
    print(clock() - start, flush=True)


def start(args, name, folder):
  command = [sys.executable, __file__, f'--worker={name}', f'--folder={folder}']
  command.append(f'--device={args.device}')
  env = dict(os.environ)
  if args.device == 'cpu':
    command = ['taskset', '-c', '0', *command]
    env |= {
      'MALLOC_MMAP_THRESHOLD_': '4000000000',
      'MALLOC_TRIM_THRESHOLD_': '8000000000',
      'OMP_NUM_THREADS': '1',
      'JAX_PLATFORMS': 'cpu',
    }
  pipe = subprocess.PIPE
  return subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, text=True)


def main():
  args = parse()
  if args.worker:
    return work(args)
  import numpy as np

  names = 'gsae_jax', 'torch'
  tokens = make_ids(args).size
  with tempfile.TemporaryDirectory() as folder:
    make_model(folder)
    workers = {name: start(args, name, folder) for name in names}
    samples = [
      np.array(json.loads(w.stdout.readline())) for w in workers.values()
    ]
    error = np.abs(samples[0] - samples[1]).max() / np.abs(samples[1]).max()
    seconds = {name: [] for name in names}
    for _ in range(args.rounds):
      for name, worker in workers.items():
        worker.stdin.write('go\n')
        worker.stdin.flush()
        seconds[name].append(float(worker.stdout.readline()))
    for worker in workers.values():
      worker.stdin.close()
      worker.wait()
  ratios = [
    theirs / ours
    for ours, theirs in zip(seconds['gsae_jax'], seconds['torch'], strict=True)
  ]
  for name in names:
    rate = tokens / statistics.median(seconds[name])
    print(f'{name:>10} {rate:12,.0f} tokens/s')
  low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
  print(
    f'gsae_jax over torch: {middle:.2f} (quartiles {low:.2f} to {high:.2f})'
  )
  print(f'largest difference of activations: {error:.1e}')


if __name__ == '__main__':
  main()
