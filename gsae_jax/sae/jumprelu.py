"""JumpReLU SAEs: what others with one product are, for inference (Appendix E).

None is trained here; `parameters` makes one of a trained SAE.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax.errors import UserError
from gsae_jax.sae import layers


class JumpReluSAE(layers.Dictionary):
  """`f = 1[p > threshold] * ReLU(p)` with `p = (x - b_dec) W_enc + b_enc`.

  `b_dec` is subtracted, as in the others, and not folded into `b_enc`, which
  would move gates by rounding. A negative threshold never binds, because of the
  ReLU.
  """

  def setup(self):
    F, D = self.features, self.width
    zeros = nn.initializers.zeros
    self.W_enc = self.param('W_enc', zeros, (D, F))
    self.b_enc = self.param('b_enc', zeros, (F,))
    self.threshold = self.param('threshold', zeros, (F,))
    self.W_dec = self.param('W_dec', zeros, (F, D))
    self.b_dec = self.param('b_dec', zeros, (D,))

  def __call__(self, x_BD: jax.Array) -> dict[str, jax.Array]:
    """Returns `f` `[..., F]` and `x_hat` `[..., D]`."""
    centred_BD = x_BD - layers.match_rank(self.b_dec, x_BD)
    z_BF = layers.product(centred_BD, self.W_enc, self.precision)
    p_BF = z_BF + layers.match_rank(self.b_enc, z_BF)
    threshold_1F = layers.match_rank(self.threshold, z_BF)
    f_BF = jnp.where(p_BF > threshold_1F, jax.nn.relu(p_BF), 0)
    return {'f': f_BF, 'x_hat': self.decode(f_BF)}


# Of each architecture: what the gate is made of, and its bias.
_GATES = {
  'gated': ('W_gate', 'b_gate'),
  'rescale_shift': ('W_enc', 'b_enc'),
}


def parameters(
  architecture: str, params: Mapping[str, jax.Array]
) -> dict[str, np.ndarray]:
  """Parameters of the `JumpReluSAE` that computes the same (paper 3.2.1).

  With `z = (x - b_dec) W` and `e = exp(r_mag)`, the gate `z + b > 0` is
  `p > b_mag - e b`, where `p = e z + b_mag` is the magnitude. Features differ by
  rounding, and a gate where rounding decides it.

  Args:
    architecture: of the SAE.
    params: its parameters.

  Returns:
    arrays of the same dtypes.

  Raises:
    UserError: gate and magnitude see different products.
  """
  p = {k: np.asarray(v) for k, v in params.items()}
  if 'W_mag' in p:
    raise UserError(
      "encoder 'untied' has no JumpReLU form: its gates and magnitudes are of "
      "two products, W_gate's and W_mag's; train 'tied' or 'no_r_mag'"
    )
  if architecture == 'jumprelu':
    return p
  if architecture == 'relu':
    return p | {'threshold': np.zeros_like(p['b_enc'])}
  W, b_gate = (p[name] for name in _GATES[architecture])
  # Weights and thresholds share one e, and each is rounded once.
  e_F = np.exp(p.get('r_mag', np.zeros_like(b_gate)))
  wide = [v.astype(np.float64) for v in (p['b_mag'], e_F, b_gate)]
  threshold_F = wide[0] - wide[1] * wide[2]
  return {
    'W_enc': W * e_F,
    'b_enc': p['b_mag'],
    'threshold': threshold_F.astype(b_gate.dtype),
    'W_dec': p['W_dec'],
    'b_dec': p['b_dec'],
  }
