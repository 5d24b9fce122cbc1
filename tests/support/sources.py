"""Sources of activations of the embedded model."""

import functools

import jax
import numpy as np

from gsae_jax.activations.forward import Forward
from gsae_jax.activations.source import Source
from gsae_jax.lm import text
from tests.support.contexts import layout_of

SITES = ('mlp_out.0', 'attn_pre_linear.0')


def forward(lm, sites=SITES, *, layout=None, batch_contexts=4, **changes):
  return Forward(
    lm,
    sites,
    layout=layout or layout_of(lm),
    batch_contexts=batch_contexts,
    **{'length': 32, 'dtypes': ('float32',)} | changes,
  )


def source(lm, contexts, *, run=None, **changes):
  values = {'rows': 5000, 'buffer_rows': 2048, 'dtype': 'float32', 'seed': 0}
  windows = [contexts] if isinstance(contexts, text.Contexts) else contexts
  return Source(run or forward(lm), windows, **values | changes)


@functools.partial(jax.jit, static_argnums=0)
def _taken(module, params, ids_CL):
  return module.apply({'params': params}, ids_CL, sites=SITES, output=None)[1]


def activations_of(lm, contexts):
  """Activations `[C, L, D]` of every token, by site."""
  return _taken(lm.module, lm.params, contexts.ids_CL)


def buffer(source, number, **kwargs):
  return source.buffer(number, dict.fromkeys(source.sites), **kwargs)


def same(a, b):
  return all(np.array_equal(a[k], b[k]) for k in a)
