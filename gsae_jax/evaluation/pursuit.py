"""Inference-time optimisation (paper, Appendix A): dictionaries without encoders.

Codes are sought for each token anew, `min ||x - a D||^2` with at most K atoms and
no negative amplitude (Eq. 12), so that dictionaries are compared whatever their
encoders are worth. After iteration k of K the state is the solution for K = k: one
run to the largest K is a whole frontier.

K, in a name's suffix, is slots of a token.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gsae_jax.errors import UserError
from gsae_jax.sae import layers

METHODS = ('gradient', 'matching')


class Codes(NamedTuple):
  """Sparse codes, a slot for each atom that was ever chosen.

  Attributes:
    atoms: int32 `[..., K]`, rows of the dictionary; -1 is an empty slot. No atom
      has two slots.
    amplitudes: `[n, ..., K]` for n numbers of iterations, none negative; 0 in an
      empty slot, and in that of an atom that was dropped.
  """

  atoms: jax.Array
  amplitudes: jax.Array


def pursue(
  x_BD: jax.Array, W_dec_FD: jax.Array, ks: tuple[int, ...], method: str
) -> Codes:
  """Codes of at most k atoms, for every k of `ks`, by one run to the largest.

  'gradient' is non-negative gradient pursuit (Blumensath and Davies 2008, as
  the paper's group ran it). Each iteration adds the atom of the largest signed
  correlation with the residual to those in use, takes a step along the gradient
  of all of them, of the length that an exact line search gives, and sets to 0
  what became negative: so there may be fewer atoms than k. 'matching' is
  non-negative matching pursuit: the chosen atom alone takes up its correlation,
  and nothing happens once no correlation is positive.

  Rows of the dictionary need not be of norm 1. Both methods work with the
  directions `d / ||d||`, and divide amplitudes by `||d||` in the end: they choose
  by `c / ||d||`, matching pursuit adds `c / ||d||^2`, and rescaling a row changes
  nothing but the unit of its amplitude. Rows of zeros are never used.

  An iteration costs one dense product, `[B, D] x [D, F]`, in true float32 on
  every device, and two gathers of K rows for each token: `B K D` numbers are held,
  beside the `B F` correlations.

  Args:
    x_BD: `[..., D]`, centred.
    W_dec_FD: the dictionary.
    ks: how many atoms at most, each at least 1.
    method: one of `METHODS`.

  Raises:
    UserError: there is no such method, or a k is below 1.
  """
  if method not in METHODS:
    raise UserError(
      f'method: {method!r} is not one of {", ".join(map(repr, METHODS))}'
    )
  if not ks or min(ks) < 1:
    raise UserError(f'k: {ks!r} must name numbers of atoms, of 1 or more')
  W_dec_FD = jnp.asarray(W_dec_FD)  # NumPy's cannot be indexed by tracers.
  norm_F = jnp.linalg.norm(W_dec_FD, axis=-1)
  inverse_F = jnp.where(norm_F > 0, 1 / jnp.where(norm_F > 0, norm_F, 1), 0)

  def one_token(x_D):
    return _pursue_token(x_D, W_dec_FD, inverse_F, ks, method)

  over_tokens = jnp.vectorize(one_token, signature='(d)->(k),(n,k)')
  atoms_BK, amplitudes_BnK = over_tokens(x_BD)
  return Codes(atoms_BK, jnp.moveaxis(amplitudes_BnK, -2, 0))


def _pursue_token(
  x_D: jax.Array,
  W_dec_FD: jax.Array,
  inverse_F: jax.Array,
  ks: tuple[int, ...],
  method: str,
) -> tuple[jax.Array, jax.Array]:
  """The atoms `[K]` of one token, and their amplitudes `[n, K]`."""
  K = max(ks)

  def combine(weights_K, atoms_K):  # Of directions.
    weights_K = weights_K * inverse_F[atoms_K]
    return layers.product(weights_K, W_dec_FD[atoms_K], 'float32')

  def step(state, i):
    atoms_K, a_K = state
    r_D = x_D - combine(a_K, atoms_K)
    c_F = layers.product(r_D, W_dec_FD.T, 'float32') * inverse_F
    chosen = jnp.argmax(c_F).astype(atoms_K.dtype)
    again_K = atoms_K == chosen
    # Iteration i has filled at most slots 0 to i - 1.
    slot = jnp.where(jnp.any(again_K), jnp.argmax(again_K), i)
    atoms_K = atoms_K.at[slot].set(chosen)
    c_K, chosen_K = c_F[atoms_K], jnp.arange(K) == slot
    if method == 'matching':
      a_K = a_K + jnp.where(chosen_K, jax.nn.relu(c_K), 0)
    else:
      g_K = jnp.where((a_K > 0) | chosen_K, c_K, 0)
      v_D = combine(g_K, atoms_K)
      v2 = jnp.sum(v_D**2)
      # Nothing is left to explain: stay.
      mu = jnp.where(v2 > 0, jnp.sum(v_D * r_D) / jnp.where(v2 > 0, v2, 1), 0)
      a_K = jax.nn.relu(a_K + mu * g_K)
    return (atoms_K, a_K), a_K

  dtype = jnp.result_type(x_D, W_dec_FD)
  start = jnp.full(K, -1, jnp.int32), jnp.zeros(K, dtype)
  (atoms_K, _), history = jax.lax.scan(step, start, jnp.arange(K))
  return atoms_K, history[jnp.array(ks) - 1] * inverse_F[atoms_K][None]


class Pursuit(nn.Module):
  """A decoder whose features are sought, to stand where an SAE does.

  Its parameters, `W_dec` and `b_dec`, are those of any trained SAE.

  Attributes:
    width: D.
    features: F.
    k: the most features that a token may have.
    method: see `pursue`.
  """

  width: int
  features: int
  k: int
  method: str = 'gradient'

  def setup(self):
    F, D = self.features, self.width
    self.W_dec = self.param('W_dec', layers.unit_rows, (F, D))
    self.b_dec = self.param('b_dec', nn.initializers.zeros, (D,))

  def __call__(self, x_BD: jax.Array) -> dict[str, jax.Array]:
    """Returns `f` `[..., F]`, of which at most `k` are not 0, and `x_hat`."""
    atoms_BK, (a_BK,) = codes = self._pursue(x_BD, (self.k,))
    fill = jnp.vectorize(
      lambda atoms_K, a_K: (
        jnp.zeros(self.features, a_K.dtype).at[atoms_K].add(a_K)
      ),
      signature='(k),(k)->(f)',
    )
    return {'f': fill(atoms_BK, a_BK), 'x_hat': self._decode(codes)[0]}

  def sweep(self, x_BD: jax.Array, ks: tuple[int, ...]) -> dict[str, jax.Array]:
    """What each k of `ks` gives, whatever `k` is; see `pursue`.

    Returns:
      `x_hat` `[n, ..., D]` and `l0`, int32 `[n, ...]`.
    """
    codes = self._pursue(x_BD, tuple(ks))
    return {
      'x_hat': self._decode(codes),
      'l0': jnp.sum(codes.amplitudes > 0, -1, dtype=jnp.int32),
    }

  def _pursue(self, x_BD: jax.Array, ks: tuple[int, ...]) -> Codes:
    centred_BD = x_BD - layers.match_rank(self.b_dec, x_BD)
    return pursue(centred_BD, self.W_dec, ks, self.method)

  def _decode(self, codes: Codes) -> jax.Array:
    """`[n, ..., D]`, from the rows that are in use."""
    W_dec_FD = jnp.asarray(self.W_dec)

    def one_token(atoms_K, a_nK):
      return layers.product(a_nK, W_dec_FD[atoms_K], 'float32')

    combine = jnp.vectorize(one_token, signature='(k),(n,k)->(n,d)')
    a_BnK = jnp.moveaxis(codes.amplitudes, 0, -2)
    x_nBD = jnp.moveaxis(combine(codes.atoms, a_BnK), -2, 0)
    return x_nBD + layers.match_rank(self.b_dec, x_nBD)
