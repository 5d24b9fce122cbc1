"""Attention by blocks against attention by definition, in float64."""

import functools

import jax
import numpy as np
import pytest

from gsae_jax.lm import attention
from tests.support.forward import QUICK


def expected(q, k, v, *, scale, window, cap):
  repeat = q.shape[2] // k.shape[2]
  q, k, v = (x.astype(np.float64) for x in (q, k, v))
  k, v = (np.repeat(x, repeat, axis=2) for x in (k, v))
  scores = np.einsum('bthk,bshk->bhts', q, k) * scale
  if cap is not None:
    scores = cap * np.tanh(scores / cap)
  back = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])
  hidden = (back < 0) | (back >= (window or len(back)))
  weights = np.exp(np.where(hidden, -np.inf, scores))
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum('bhts,bshk->bthk', weights, v)


SIZES = [(128, 8, 512), (8, 3, 512), (8, 3, 8)]
# A cap changes the scores before anything is hidden: one window shows it, and the
# others are slow.
CASES = [
  pytest.param(
    sizes,
    window,
    cap,
    marks=[pytest.mark.slow] if cap and window != 5 else [],
  )
  for sizes in SIZES
  for window in (None, 1, 5, 40)
  for cap in (None, 1.5)
]


def attend(q, k, v, **settings):
  """Compiled anew: sizes of blocks are read when it is traced."""
  compiled = jax.jit(
    functools.partial(attention.attend, **settings), compiler_options=QUICK
  )
  return compiled(q, k, v)


@pytest.mark.parametrize('sizes, window, cap', CASES)
def test_blocks_give_what_the_definition_gives(
  sizes, window, cap, rng, monkeypatch
):
  for name, size in zip(('_BLOCK', '_BLOCKS', '_ROWS'), sizes, strict=True):
    monkeypatch.setattr(attention, name, size)
  # 61 queries: blocks of 61, of 21, and of 24 in three turns; the last ragged.
  q = rng.normal(size=(2, 61, 6, 4)).astype(np.float32)
  k, v = rng.normal(size=(2, 2, 61, 3, 4)).astype(np.float32)
  settings = {'scale': 0.7, 'window': window, 'cap': cap}
  got = attend(q, k, v, **settings)
  np.testing.assert_allclose(got, expected(q, k, v, **settings), atol=2e-6)


def test_bfloat16_rounds_once_on_the_way_out(rng):
  q, k, v = rng.normal(size=(3, 1, 200, 4, 16)).astype('bfloat16')
  settings = {'scale': 0.25, 'window': None, 'cap': None}
  got = attend(q, k, v, **settings)
  assert got.dtype == 'bfloat16'
  want = expected(q, k, v, **settings)
  error = np.abs(np.asarray(got).astype(np.float64) - want).max()
  assert error < 2**-7 * np.abs(want).max()


@pytest.mark.parametrize('window', [None, 4096])
def test_scores_of_a_long_context_are_never_held_whole(window):
  length, heads = 2**15, 2
  shape = jax.ShapeDtypeStruct((1, length, heads, 8), np.float32)
  blocks = functools.partial(
    attention.attend, scale=1.0, window=window, cap=None
  )
  memory = jax.jit(blocks).lower(shape, shape, shape).compile(QUICK)
  whole = heads * length * length * 4
  assert memory.memory_analysis().temp_size_in_bytes < whole / 20
