"""Contexts of real text, and layouts of a model on the fake devices."""

import jax  # noqa: E402

from gsae_jax.lm import text  # noqa: E402
from gsae_jax.lm.layouts import make_layout  # noqa: E402


def layout_of(lm, kind='replicated', *, model=1, devices=None):
  """The model on so many of the fake devices; all, if it is not said."""
  devices = jax.local_devices()[:devices]
  return make_layout(kind, lm.module.config, lm.bytes, devices, model)


def held_out_contexts(lm, *, documents, rows, characters=None, **changes):
  """Contexts of the beginnings of held-out documents of the standard library."""
  settings = {
    'context_length': 32,
    'packing': 'stream',
    'prepend_bos': True,
    'special_tokens': 'drop',
  }
  texts = text.split(text.read_documents('stdlib', None), 0.1, 'held_out')
  return text.pack(
    [t[:characters] for t in texts[:documents]],
    lm.tokenizer,
    rows=rows,
    **settings | changes,
  )
