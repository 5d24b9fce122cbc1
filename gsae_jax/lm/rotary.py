"""Rotary positions (Su et al. 2021), and the ways to stretch them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rope:
  """How far a head's first `2 * len(frequencies)` numbers turn per position.

  Attributes:
    frequencies: radians per position of the pairs `(k, k + R/2)`.
    scale: of sine and cosine; YaRN sharpens attention by it.
  """

  frequencies: tuple[float, ...]
  scale: float = 1.0

  def tables(self, length: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[L, R/2]` in float32 of positions 0 to length - 1."""
    frequency = np.asarray(self.frequencies, np.float32)
    angle_LK = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency[None]
    return jnp.cos(angle_LK) * self.scale, jnp.sin(angle_LK) * self.scale


def rotate(x_BLHK: jax.Array, rope: Rope) -> jax.Array:
  """Turns the first numbers of every head by its position."""
  half = len(rope.frequencies)
  cos, sin = (t[None, :, None] for t in rope.tables(x_BLHK.shape[1]))
  x = x_BLHK.astype(jnp.float32)
  a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)
  return turned.astype(x_BLHK.dtype)


def make_rope(
  settings: Mapping[str, Any], head_width: int, context: int
) -> Rope:
  """What a config.json says of rotary positions, as numbers.

  Args:
    settings: transformers' `rope_parameters`, of one kind of layer.
    head_width: K.
    context: positions that the model takes.

  Raises:
    UserError: the kind of scaling is unknown.
  """
  theta = settings['rope_theta']
  width = int(head_width * settings.get('partial_rotary_factor', 1.0))
  power = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
  frequency = 1.0 / np.float32(theta) ** power
  kind = settings.get('rope_type', 'default')
  scale = 1.0
  if kind == 'linear':
    frequency /= settings['factor']
  elif kind == 'llama3':
    frequency = _llama3(frequency, settings)
  elif kind == 'yarn':
    frequency, scale = _yarn(frequency, width, settings, context)
  elif kind not in ('default', 'dynamic'):
    # 'dynamic' changes nothing up to the context that the model was made for.
    raise UserError(
      f'lm.path: rotary scaling {kind!r} is not supported; use a model whose '
      'rope_type is default, linear, dynamic, llama3 or yarn'
    )
  return Rope(tuple(frequency.astype(np.float32).tolist()), scale)


def _llama3(frequency: np.ndarray, s: Mapping[str, Any]) -> np.ndarray:
  """Slow turns are slowed down further, fast ones left (Llama 3.1)."""
  turns = s['original_max_position_embeddings'] * frequency / (2 * math.pi)
  low, high = s['low_freq_factor'], s['high_freq_factor']
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return (1 - kept) * frequency / s['factor'] + kept * frequency


def _yarn(
  frequency: np.ndarray, width: int, s: Mapping[str, Any], context: int
) -> tuple[np.ndarray, float]:
  """The same by a ramp over dimensions, and a temperature (Peng et al. 2023)."""
  original = s['original_max_position_embeddings']
  factor = s.get('factor') or context / original

  def dimension(turns: float) -> float:
    log_period = math.log(original / (turns * 2 * math.pi))
    return width * log_period / (2 * math.log(s['rope_theta']))

  low = dimension(s.get('beta_fast') or 32)
  high = dimension(s.get('beta_slow') or 1)
  if s.get('truncate', True):
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  span = high - low or 0.001
  slowed = np.clip((np.arange(width // 2) - low) / span, 0, 1)

  def temperature(weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

  scale = s.get('attention_factor')
  if scale is None:
    scale = temperature()
    if s.get('mscale') and s.get('mscale_all_dim'):
      scale = temperature(s['mscale']) / temperature(s['mscale_all_dim'])
  return frequency * (slowed / factor + 1 - slowed), float(scale)
