"""The baseline: an L1-trained ReLU SAE (paper section 2.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gsae_jax.sae import layers


class ReluSAE(nn.Module):
  """Attributes are those of `GatedSAE`; the encoder is `W_enc`, `b_enc`."""

  width: int
  features: int
  encoder_scale: float = 1.0

  encoder = 'W_enc'

  def setup(self):
    F, D = self.features, self.width
    self.W_dec = self.param('W_dec', layers.unit_rows, (F, D))
    self.W_enc = self.param(
      'W_enc', lambda _: self.encoder_scale * self.W_dec.T
    )
    self.b_enc = self.param('b_enc', nn.initializers.zeros, (F,))
    self.b_dec = self.param('b_dec', nn.initializers.zeros, (D,))

  def __call__(self, x_BD: jax.Array) -> dict[str, jax.Array]:
    """Returns `f` `[..., F]` (Eq. 2) and `x_hat` `[..., D]` (Eq. 3)."""
    z_BF = layers.centred_product(x_BD, self.b_dec, self.W_enc)
    f_BF = jax.nn.relu(z_BF + self.b_enc)
    return {'f': f_BF, 'x_hat': self.decode(f_BF)}

  def encode(self, x_BD: jax.Array) -> jax.Array:
    """`[..., D] -> [..., F]`."""
    return self(x_BD)['f']

  def decode(self, f_BF: jax.Array) -> jax.Array:
    """`[..., F] -> [..., D]`."""
    return layers.decode(f_BF, self.W_dec, self.b_dec)

  def losses(self, x_BD: jax.Array) -> dict[str, jax.Array]:
    """The terms of Eq. 4, as `GatedSAE.losses`; `auxiliary` is 0."""
    out = self(x_BD)
    return {
      'reconstruction': layers.squared_error(x_BD, out['x_hat']),
      'sparsity': jnp.mean(jnp.sum(out['f'], -1)),
      'auxiliary': jnp.zeros(()),
      'f': out['f'],
    }
