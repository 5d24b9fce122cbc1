"""One compiled program of a language model, for what tests ask of its sites."""

import functools

import jax
import numpy as np

# What LLVM's optimisation gains is less than it takes to compile: half of it.
QUICK = {'xla_backend_optimization_level': 0}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _run(module, params, ids_BL, gains, offsets):
  def edit(site):
    return lambda x_BLD: (
      gains[site][..., None] * x_BLD.astype(np.float32)
      + offsets[site][..., None]
    ).astype(x_BLD.dtype)

  return module.apply(
    {'params': params},
    ids_BL,
    sites=tuple(gains),
    edits={site: edit(site) for site in gains},
  )


def run(lm, ids_BL, *, gains=None, offsets=None):
  """Runs a model with every site scaled and shifted.

  Whatever is asked for, the program is the same: a model is compiled once for
  ids of one shape. An edit that multiplies by 1 and adds 0 is exact.

  Args:
    lm: the language model.
    ids_BL: token ids.
    gains: `[B, L]` by site; where a site is left out, 1.
    offsets: likewise, 0.

  Returns:
    logits `[B, L, V]`, and the activations of all sites.
  """
  sites = lm.module.config.site_widths()
  ones = dict.fromkeys(sites, np.ones(ids_BL.shape, np.float32))
  zeros = dict.fromkeys(sites, np.zeros(ids_BL.shape, np.float32))
  return _run(
    lm.module, lm.params, ids_BL, ones | (gains or {}), zeros | (offsets or {})
  )
