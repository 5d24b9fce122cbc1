"""Gated SAE (arXiv 2404.16014, section 3.2), and its ablations (5.1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gsae_jax.sae import layers

ENCODERS = ('tied', 'untied', 'no_r_mag')


class GatedSAE(layers.Dictionary):
  """Gate and magnitude from one product (Eq. 7), and an auxiliary task.

  Attributes:
    encoder: 'tied', `W_mag = W_gate exp(r_mag)` (Eq. 7); 'no_r_mag', `W_mag =
      W_gate`; 'untied', `W_mag` is a parameter.
    freeze_aux_decoder: the auxiliary term passes no gradient to the decoder
      (Eq. 8); with sparsity='decoder_norm_l1', neither do the norms there.
    centre_stop_gradient: it passes none to `b_dec` through the encoder either.
    sparsity: see `layers.weighted_l1`; all but 'l1' let the norms go free.
    encoder_scale: `W_gate` starts at this times `W_dec^T`.
  """

  encoder: str = 'tied'
  freeze_aux_decoder: bool = True
  centre_stop_gradient: bool = False
  sparsity: str = 'l1'
  encoder_scale: float = 1.0

  @property
  def encoders(self) -> tuple[str, ...]:
    """Parameters whose columns detect the features."""
    return ('W_gate', 'W_mag') if self.encoder == 'untied' else ('W_gate',)

  @property
  def unit_rows(self) -> bool:
    """Whether decoder rows are held at norm 1."""
    return self.sparsity == 'l1'

  @property
  def vectors(self) -> tuple[str, ...]:
    """Parameters that are a number for each feature."""
    return ('b_gate', 'b_mag') + ('r_mag',) * (self.encoder == 'tied')

  @property
  def is_exact_on_open_gates(self) -> bool:
    """Whether `codes` and the decoder are all that the loss depends on."""
    return (
      self.encoder != 'untied'
      and self.freeze_aux_decoder
      and not self.centre_stop_gradient
      and self.sparsity == 'l1'
    )

  def gate(self, z, z_mag, p) -> tuple[jax.Array, jax.Array]:
    """`pi_gate` and `f` (Eq. 6 and 7) of what lies in front of the biases.

    Args:
      z: `(x - b_dec) W_gate`, of any features.
      z_mag: `(x - b_dec) W_mag`, but for the factor of `r_mag`.
      p: the `vectors` of these features, of the rank of `z`, with axes of size 1.
    """
    if self.encoder == 'tied':
      z_mag = z_mag * jnp.exp(p['r_mag'])
    pi_gate = z + p['b_gate']
    return pi_gate, jnp.where(pi_gate > 0, jax.nn.relu(z_mag + p['b_mag']), 0)

  def codes(self, z, p) -> tuple[jax.Array, ...]:
    """What Eq. 8 decodes, the last being what it penalises; see `gate`.

    Where the last is 0, so are the others and all gradients.
    """
    pi_gate, f = self.gate(z, z, p)
    return f, jax.nn.relu(pi_gate)

  def setup(self):
    zeros = nn.initializers.zeros
    F, D = self.features, self.width
    self.W_dec = self.param('W_dec', layers.unit_rows, (F, D))
    start = lambda _: self.encoder_of(self.W_dec, self.encoder_scale)
    self.W_gate = self.param('W_gate', start)
    self.b_gate = self.param('b_gate', zeros, (F,))
    if self.encoder == 'tied':
      self.r_mag = self.param('r_mag', zeros, (F,))
    if self.encoder == 'untied':
      self.W_mag = self.param('W_mag', start)
    self.b_mag = self.param('b_mag', zeros, (F,))
    self.b_dec = self.param('b_dec', zeros, (D,))

  def __call__(self, x_BD: jax.Array) -> dict[str, jax.Array]:
    """Every intermediate by name.

    Args:
      x_BD: `[..., D]` activations.

    Returns:
      `pi_gate`, `f` (Eq. 6), both `[..., F]`, and `x_hat` `[..., D]`; and
      `pi_gate_centred`, of the value of `pi_gate`, without gradient for `b_dec`.
    """
    gate_BF, shift_1F = self.centred(x_BD, self.W_gate)
    mag_BF, mag_shift_1F = gate_BF, shift_1F
    if self.encoder == 'untied':
      mag_BF, mag_shift_1F = self.centred(x_BD, self.W_mag)
    p = {k: layers.match_rank(getattr(self, k), gate_BF) for k in self.vectors}
    pi_gate_BF, f_BF = self.gate(gate_BF - shift_1F, mag_BF - mag_shift_1F, p)
    return {
      'pi_gate': pi_gate_BF,
      'pi_gate_centred': gate_BF + p['b_gate'],
      'f': f_BF,
      'x_hat': self.decode(f_BF),
    }

  def terms(self, x_BD: jax.Array) -> dict[str, jax.Array]:
    """The terms of Eq. 8 for each row, without coefficients.

    Returns:
      `reconstruction`, `sparsity` and `auxiliary`, `[B]` each, and what
      `__call__` returns.
    """
    out = self(x_BD)
    # Eq. 8's sparsity and auxiliary terms see the gate path only.
    path = 'pi_gate_centred' if self.centre_stop_gradient else 'pi_gate'
    decoder = self.W_dec, self.b_dec
    if self.freeze_aux_decoder:
      decoder = jax.lax.stop_gradient(decoder)
    x_aux_BD = layers.decode(
      jax.nn.relu(out[path]), *decoder, precision=self.precision
    )
    return out | {
      'reconstruction': layers.squared_error(x_BD, out['x_hat']),
      'sparsity': layers.weighted_l1(
        jax.nn.relu(out['pi_gate']),
        self.W_dec,
        self.sparsity,
        frozen=self.freeze_aux_decoder,
      ),
      'auxiliary': layers.squared_error(x_BD, x_aux_BD),
    }
