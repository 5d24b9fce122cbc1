"""The loss that is trained, and the units of its squared errors."""

from typing import cast

import flax.linen as nn
import jax
import numpy as np

# A float32 scalar: NumPy's on the host, JAX's in a program.
Scalar = jax.Array | np.float32


def error_scale(loss_scale: str, *, width: int, mean_norm: float) -> float:
  """The factor of squared errors (paper D.1.1).

  Args:
    loss_scale: 'sum', as Eq. 4 and 8 are written; 'mean', over D, the units of
      the paper's tables; or 'mean_over_norm', over D and E||x||, those of its
      baselines on Pythia and Gemma.
    width: D.
    mean_norm: E||x|| of the activations as the loss sees them.
  """
  divisors = {'sum': 1.0, 'mean': width, 'mean_over_norm': width * mean_norm}
  return 1.0 / divisors[loss_scale]


def losses(
  module: nn.Module,
  params: dict[str, jax.Array],
  x_BD: jax.Array,
  l1: jax.Array,
  error_scale: Scalar,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Eq. 4 or 8 for each row, and everything on the way there.

  Args:
    module: the architecture.
    params: its parameters.
    x_BD: `[B, D]` activations, scaled.
    l1: coefficient of the sparsity term.
    error_scale: of the squared errors.

  Returns:
    `[B]`, and what the module's `terms` returns.
  """
  applied = module.apply({'params': params}, x_BD, method='terms')
  terms = cast(dict[str, jax.Array], applied)
  error_B = error_scale * (terms['reconstruction'] + terms['auxiliary'])
  return error_B + l1 * terms['sparsity'], terms
