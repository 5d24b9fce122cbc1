"""Activations like those of language models, and an SAE as open as it is asked to be.

Needs nothing but NumPy, so that the environment of the peers can import it.
"""

import os
from typing import Any

import numpy as np

BATCHES = 4  # That a step meets by turns.
_PLANTED, _ACTIVE = 8192, 32
_ROWS = 512  # That open gates are counted on.


def activations(rows: int, width: int, seed: int = 0) -> np.ndarray:
  """Sparse codes of planted directions, with a mean and noise.

  Directions are met with power-law frequencies and exponential magnitudes, so
  that open gates are as unequally spread over tokens as in real SAEs.

  Args:
    rows: N.
    width: D.
    seed: of all draws.

  Returns:
    `[N, D]` float32, of E||x||^2 = D.
  """
  rng = np.random.default_rng(seed)
  directions = rng.standard_normal((_PLANTED, width), np.float32)
  directions /= np.linalg.norm(directions, axis=1, keepdims=True)
  frequency = (np.arange(_PLANTED) + 10.0) ** -0.8
  which = rng.choice(
    _PLANTED, size=(rows, _ACTIVE), p=frequency / frequency.sum()
  )
  size = rng.exponential(1.0, (rows, _ACTIVE)).astype(np.float32) + 0.3
  x_ND = rng.standard_normal((rows, width), np.float32) * 0.1
  x_ND += rng.standard_normal(width).astype(np.float32) / 2
  x_ND /= np.sqrt(np.float32(width))
  for j in range(_ACTIVE):
    x_ND += size[:, j, None] * directions[which[:, j]]
  return x_ND * np.float32(np.sqrt(width / np.mean(np.sum(x_ND**2, 1))))


def parameters(
  x_ND: np.ndarray, features: int, l0: float, seed: int = 1
) -> dict[str, np.ndarray]:
  """A Gated SAE with tied directions.

  Args:
    x_ND: activations.
    features: F.
    l0: open gates per token; 0 leaves all biases at zero, as training starts,
      where half the gates are open.
    seed: of the directions.

  Returns:
    all by the paper's names but `W_gate`, which is `W_dec^T`.
  """
  rng = np.random.default_rng(seed)
  width = x_ND.shape[1]
  W_dec_FD = rng.standard_normal((features, width), np.float32)
  W_dec_FD /= np.linalg.norm(W_dec_FD, axis=1, keepdims=True)
  zeros = lambda n: np.zeros(n, np.float32)
  params = {
    'W_dec': W_dec_FD,
    'b_gate': zeros(features),
    'r_mag': zeros(features),
    'b_mag': zeros(features),
    'b_dec': zeros(width),
  }
  if l0:
    pi = x_ND[:_ROWS] @ W_dec_FD.T
    bias = -np.quantile(pi, 1 - l0 / features).astype(np.float32)
    params['b_gate'] += bias
    params['b_mag'] += np.float32(0.9) * bias
    params['r_mag'] += 0.05 * rng.standard_normal(features).astype(np.float32)
  return params


def open_gates(params: dict[str, np.ndarray], x_ND: np.ndarray) -> float:
  """Per token, over the first rows."""
  centred = x_ND[:_ROWS] - params['b_dec']
  pi = centred @ params['W_gate'] + params['b_gate']
  return float(np.sum(pi > 0)) / len(pi)


def write(folder: str, x_ND: np.ndarray, params: dict[str, Any]) -> None:
  """For workers: all of them start from the same numbers."""
  for name, value in {'x': x_ND, **params}.items():
    np.save(os.path.join(folder, f'{name}.npy'), value)


def read(folder: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """What `write` wrote, with `W_gate`."""
  names = ('x', 'W_dec', 'b_gate', 'r_mag', 'b_mag', 'b_dec')
  values = {n: np.load(os.path.join(folder, f'{n}.npy')) for n in names}
  x_ND = values.pop('x')
  return x_ND, values | {'W_gate': np.ascontiguousarray(values['W_dec'].T)}
