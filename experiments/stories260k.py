r"""Gated against baseline SAEs on a real Llama, stories260K (Karpathy).

PLACEHOLDER
"""

import ml_collections

from experiments import quickstart


def get_config() -> ml_collections.ConfigDict:
  c = quickstart.get_config()
  # A Hugging Face folder of the model, and a file of TinyStories; given on the
  # command line, because neither comes with this package.
  c.lm.path = 'stories260k'
  c.text.path = 'tinystories.txt'
  c.text.separator = '<|endoftext|>'
  # The model was trained on stories from their beginning on.
  c.text.packing = 'documents'
  c.text.context_length = 256
  c.sites = ('resid_post.2', 'mlp_out.2')
  c.store.tokens = 600_000
  c.store.batch_contexts = 32
  c.train.checkpoint_every = c.train.get_ref('steps') // 3
  c.saes = tuple(
    {
      'name': f'{architecture}_{site}_{l1:g}',
      'architecture': architecture,
      'site': site,
      'features': features,
      'l1': l1,
      'learning_rate': rate,
    }
    for site in c.sites
    for architecture, features, rate in (
      ('gated', 256, 3e-3),
      ('relu', 384, 6e-3),
    )
    for l1 in (0.03, 0.06, 0.12, 0.24)
  )
  c.eval.batch_size = 16
  return c
