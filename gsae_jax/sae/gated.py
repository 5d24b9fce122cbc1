"""Gated SAE (arXiv 2404.16014, section 3.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gsae_jax.sae import layers


class GatedSAE(nn.Module):
  """Tied weights: `W_mag = W_gate exp(r_mag)` (Eq. 7).

  Attributes:
    width: D.
    features: F.
    encoder_scale: `W_gate` starts at this times `W_dec^T`.
  """

  width: int
  features: int
  encoder_scale: float = 1.0

  encoder = 'W_gate'  # The parameter whose columns detect the features.

  def setup(self):
    zeros = nn.initializers.zeros
    F, D = self.features, self.width
    self.W_dec = self.param('W_dec', layers.unit_rows, (F, D))
    self.W_gate = self.param(
      'W_gate', lambda _: self.encoder_scale * self.W_dec.T
    )
    self.b_gate = self.param('b_gate', zeros, (F,))
    self.r_mag = self.param('r_mag', zeros, (F,))
    self.b_mag = self.param('b_mag', zeros, (F,))
    self.b_dec = self.param('b_dec', zeros, (D,))

  def __call__(self, x_BD: jax.Array) -> dict[str, jax.Array]:
    """Every intermediate by name.

    Args:
      x_BD: `[..., D]` activations.

    Returns:
      `pi_gate`, `f` (Eq. 6), both `[..., F]`, and `x_hat` `[..., D]`.
    """
    z_BF = layers.centred_product(x_BD, self.b_dec, self.W_gate)
    pi_gate_BF = z_BF + self.b_gate
    pi_mag_BF = jnp.exp(self.r_mag) * z_BF + self.b_mag
    f_BF = jnp.where(pi_gate_BF > 0, jax.nn.relu(pi_mag_BF), 0)
    return {'pi_gate': pi_gate_BF, 'f': f_BF, 'x_hat': self.decode(f_BF)}

  def encode(self, x_BD: jax.Array) -> jax.Array:
    """`f = 1[pi_gate > 0] * ReLU(pi_mag)` (Eq. 6), `[..., D] -> [..., F]`."""
    return self(x_BD)['f']

  def decode(self, f_BF: jax.Array) -> jax.Array:
    """`[..., F] -> [..., D]`."""
    return layers.decode(f_BF, self.W_dec, self.b_dec)

  def losses(self, x_BD: jax.Array) -> dict[str, jax.Array]:
    """The terms of Eq. 8, each a mean over the batch, without coefficients.

    Returns:
      scalars `reconstruction`, `sparsity` and `auxiliary`, and `f` `[B, F]`.
    """
    out = self(x_BD)
    # Eq. 8's sparsity and auxiliary terms see the gate path only.
    relu_gate_BF = jax.nn.relu(out['pi_gate'])
    x_aux_BD = layers.decode(
      relu_gate_BF,
      jax.lax.stop_gradient(self.W_dec),
      jax.lax.stop_gradient(self.b_dec),
    )
    return {
      'reconstruction': layers.squared_error(x_BD, out['x_hat']),
      'sparsity': jnp.mean(jnp.sum(relu_gate_BF, -1)),
      'auxiliary': layers.squared_error(x_BD, x_aux_BD),
      'f': out['f'],
    }


def jumprelu_parameters(
  params: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The equivalent JumpReLU encoder (paper 3.2.1 and Appendix E).

  `f(x) = 1[p > theta] * ReLU(p)` with `p = x W + b`. A negative threshold never
  binds, because of the ReLU.

  Returns:
    `W [D, F]`, `b [F]`, `theta [F]`.
  """
  magnitude_F = jnp.exp(params['r_mag'])
  W_DF = params['W_gate'] * magnitude_F
  b_F = params['b_mag'] - params['b_dec'] @ W_DF
  return W_DF, b_F, params['b_mag'] - magnitude_F * params['b_gate']
