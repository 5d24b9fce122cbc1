r"""Quickstart."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.lm = {'path': '/tmp/w/emb1', 'revision': ml_collections.config_dict.placeholder(str), 'dtype': 'float32'}
  c.text = {
    'path': 'stdlib', 'separator': ml_collections.config_dict.placeholder(str), 'context_length': 128, 'packing': 'stream',
    'prepend_bos': True, 'special_tokens': 'drop', 'held_out': 0.1,
  }
  c.sites = ('mlp_out.0',)
  c.store = {'tokens': 1_000_000, 'shard_rows': 16384, 'chunk_rows': 16, 'dtype': 'float32', 'batch_contexts': 64}
  steps = 3000
  c.train = {
    'steps': steps, 'batch_size': 512, 'learning_rate': 3e-3, 'warmup_steps': steps // 10, 'l1_warmup_steps': steps // 10,
    'decay_steps': steps // 5, 'resample_steps': (), 'resample_rows': 0, 'dead_after': 200, 'encoder_scale': 0.2,
    'normalize': 'mean_squared_norm', 'loss_scale': 'sum', 'checkpoint_every': 1000, 'checkpoints_kept': ml_collections.config_dict.placeholder(int),
    'log_every': 50, 'writers': ('tensorboard',),
  }
  saes = []
  for l1 in (0.02, 0.04, 0.08, 0.16):
    saes.append({'name': f'gated_{l1}', 'architecture': 'gated', 'site': 'mlp_out.0', 'features': 512, 'l1': l1})
    saes.append({'name': f'relu_{l1}', 'architecture': 'relu', 'site': 'mlp_out.0', 'features': 768, 'l1': l1})
  c.saes = tuple(saes)
  c.eval = {'tokens': 32768, 'batch_size': 32, 'parallel': 'pmap'}
  c.mesh = {'data': -1, 'model': 1}
  return c
