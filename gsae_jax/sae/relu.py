"""The baseline, an L1-trained ReLU SAE (paper 2.2), and its rescaling (5.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gsae_jax.sae import layers


class ReluSAE(layers.Dictionary):
  """Attributes as of `GatedSAE`; the encoder is `W_enc`, `b_enc`."""

  sparsity: str = 'l1'
  encoder_scale: float = 1.0

  encoders = ('W_enc',)
  vectors = ('b_enc',)

  @property
  def unit_rows(self) -> bool:
    return self.sparsity == 'l1'

  @property
  def is_exact_on_open_gates(self) -> bool:
    return self.sparsity == 'l1'

  def codes(self, z, p) -> tuple[jax.Array, ...]:
    """As `GatedSAE.codes`."""
    return (jax.nn.relu(z + p['b_enc']),)

  def setup(self):
    F, D = self.features, self.width
    self.W_dec = self.param('W_dec', layers.unit_rows, (F, D))
    self.W_enc = self.param(
      'W_enc', lambda _: self.encoder_of(self.W_dec, self.encoder_scale)
    )
    self.b_enc = self.param('b_enc', nn.initializers.zeros, (F,))
    self.b_dec = self.param('b_dec', nn.initializers.zeros, (D,))

  def __call__(self, x_BD: jax.Array) -> dict[str, jax.Array]:
    """Returns `f` `[..., F]` (Eq. 2) and `x_hat` `[..., D]` (Eq. 3)."""
    z_BF, shift_1F = self.centred(x_BD, self.W_enc)
    b_enc_1F = layers.match_rank(self.b_enc, z_BF)
    (f_BF,) = self.codes(z_BF - shift_1F, {'b_enc': b_enc_1F})
    return {'f': f_BF, 'x_hat': self.decode(f_BF)}

  def terms(self, x_BD: jax.Array) -> dict[str, jax.Array]:
    """The terms of Eq. 4, as `GatedSAE.terms`; `auxiliary` is 0."""
    out = self(x_BD)
    return out | {
      'reconstruction': layers.squared_error(x_BD, out['x_hat']),
      'sparsity': layers.weighted_l1(
        out['f'], self.W_dec, self.sparsity, frozen=False
      ),
      'auxiliary': jnp.zeros(x_BD.shape[:-1]),
    }


class RescaleShiftSAE(layers.Dictionary):
  """A frozen baseline whose magnitudes are learned anew (paper 5.2, footnote 12).

  `f = 1[z + b_enc > 0] * ReLU(exp(r_mag) z + b_mag)` with `z = (x - b_dec) W_enc`.
  It starts equal to the baseline, and only its reconstruction is trained; the
  paper gives neither its loss nor its start.
  """

  encoders = ('W_enc',)
  frozen = ('W_enc', 'b_enc', 'W_dec', 'b_dec')
  is_exact_on_open_gates = False  # Nothing of it is worth skipping.
  unit_rows = False  # They are what they were.

  def setup(self):
    F, D = self.features, self.width
    zeros = nn.initializers.zeros
    self.W_dec = self.param('W_dec', zeros, (F, D))
    shape = (F, D) if self.turned else (D, F)
    self.W_enc = self.param('W_enc', zeros, shape)
    for name in ('b_enc', 'r_mag', 'b_mag'):
      setattr(self, name, self.param(name, zeros, (F,)))
    self.b_dec = self.param('b_dec', zeros, (D,))

  @staticmethod
  def start(baseline: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Parameters that equal those of a `ReluSAE`."""
    b_enc_F = baseline['b_enc']
    return baseline | {'r_mag': jnp.zeros_like(b_enc_F), 'b_mag': b_enc_F}

  def __call__(self, x_BD: jax.Array) -> dict[str, jax.Array]:
    """Returns `f` `[..., F]` and `x_hat` `[..., D]`."""
    z_BF, shift_1F = self.centred(x_BD, self.W_enc)
    z_BF -= shift_1F
    b_enc_1F, r_mag_1F, b_mag_1F = (
      layers.match_rank(v_F, z_BF)
      for v_F in (self.b_enc, self.r_mag, self.b_mag)
    )
    pi_mag_BF = jnp.exp(r_mag_1F) * z_BF + b_mag_1F
    f_BF = jnp.where(z_BF + b_enc_1F > 0, jax.nn.relu(pi_mag_BF), 0)
    return {'f': f_BF, 'x_hat': self.decode(f_BF)}

  def terms(self, x_BD: jax.Array) -> dict[str, jax.Array]:
    """As `ReluSAE.terms`; `sparsity` is 0 as well."""
    out = self(x_BD)
    none_B = jnp.zeros(x_BD.shape[:-1])
    return out | {
      'reconstruction': layers.squared_error(x_BD, out['x_hat']),
      'sparsity': none_B,
      'auxiliary': none_B,
    }
