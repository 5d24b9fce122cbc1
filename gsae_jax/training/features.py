"""What a step does with some features at a time, and keeps of it.

Gradients of weights go at once to where they are used. Features come first here:
`z_FB`. T is features of a part, U the rows of a batch that it looks at.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gsae_jax.sae.layers import product
from gsae_jax.sae.tiles import put_rows, take
from gsae_jax.training.loss import Scalar

_BLOCK = 512
_DEVICES = 'data', 'model'  # Of a mesh, those of one SAE.


class Sums(NamedTuple):
  """Of the whole batch, the same on every device.

  Attributes:
    reconstruction: squared error.
    auxiliary: the same of the auxiliary reconstruction; 0 without one.
    sparsity: the penalised codes.
    x_hat_squared: `||x_hat||^2`.
    dot: `x_hat . x`.
    open_share: the share of features that is open in a tile of rows, mean over
      tiles. It decides what a sparse step takes; 1 where nobody asks.
  """

  reconstruction: jax.Array
  auxiliary: jax.Array
  sparsity: jax.Array
  x_hat_squared: jax.Array
  dot: jax.Array
  open_share: jax.Array


@dataclasses.dataclass(frozen=True)
class Some:
  """Features by their numbers `[T]`; those that are not `live` are left alone."""

  ids: jax.Array
  live: jax.Array

  def take(self, a: jax.Array) -> jax.Array:
    return take(a, self.ids)

  def put(self, a: jax.Array, rows: jax.Array) -> jax.Array:
    return put_rows(a, self.ids, self.live, rows)

  def keep(self, rows: jax.Array) -> jax.Array:
    """Rows, 0 where they are not live."""
    live = self.live.reshape(-1, *(1,) * (rows.ndim - 1))
    return jnp.where(live, rows, 0)


class All:
  """Those of the arrays at hand."""

  def take(self, a: jax.Array) -> jax.Array:
    return a

  def put(self, a: jax.Array, rows: jax.Array) -> jax.Array:
    del a
    return rows

  def keep(self, rows: jax.Array) -> jax.Array:
    return rows


At = Some | All


class Carry(NamedTuple):
  """What a step moves.

  Attributes:
    params: without `b_dec`.
    others: arrays that lie as the parameters do: moments, or gradients.
    sums: scalars.
  """

  params: dict[str, jax.Array]
  others: dict[str, jax.Array]
  sums: dict[str, jax.Array]


# Of a carry, features, their parameters and gradients by name, the next carry.
Write = Callable[[Carry, At, dict[str, jax.Array], dict[str, jax.Array]], Carry]


@dataclasses.dataclass(frozen=True)
class Batch:
  """What of a device's part of a batch the gradients depend on.

  Attributes:
    module: the architecture.
    x_BD: rows, without `b_dec`.
    back: cotangents of what each code decodes to, `[B, D]`.
    l1: that of the last code.
    write: what becomes of gradients.
  """

  module: nn.Module
  x_BD: jax.Array
  back: list[jax.Array]
  l1: jax.Array
  write: Write


class Walk(NamedTuple):
  """What goes from some features to the next.

  Attributes:
    carry: of `Write`.
    pulled_D: cotangents of `z`, times the encoder.
    fired_F: int32, rows that each feature fired on.
    norm_error: the furthest that a decoder row was from norm 1.
  """

  carry: Carry
  pulled_D: jax.Array
  fired_F: jax.Array
  norm_error: jax.Array


def block_size(features: int) -> int:
  """How many are taken at a time where all are, so that they fit a cache."""
  return _BLOCK if features % _BLOCK == 0 else features


def is_open(codes: tuple[jax.Array, ...]) -> jax.Array:
  # What is not a number counts as open, and is seen in the loss.
  return ~(codes[-1] <= 0)


def columns(module: nn.Module, params) -> dict[str, jax.Array]:
  """The numbers of each feature, `[T, 1]`."""
  return {k: params[k][:, None] for k in module.vectors}


def start(carry: Carry) -> Walk:
  """Before the first features."""
  F, D = carry.params['W_dec'].shape
  return Walk(carry, jnp.zeros(D), jnp.zeros(F, jnp.int32), jnp.zeros(()))


def read(module: nn.Module, carry: Carry, at: At) -> dict[str, jax.Array]:
  """The parameters of some features that a step needs."""
  names = ('W_dec', *module.encoders, *module.vectors)
  return {name: at.take(carry.params[name]) for name in names}


def gradients(batch: Batch, z_TU, filled_U, x_UD, back_UD, seen, params):
  """Of some features, on some rows.

  Args:
    batch: which.
    z_TU: of these features and rows.
    filled_U: which rows count; None is all.
    x_UD: these rows of `batch.x_BD`.
    back_UD: and of the first of `batch.back`.
    seen: `W_dec` times each of `batch.back`, `[T, U]`.
    params: the features'.

  Returns:
    gradients by name; cotangents of `z`, summed over rows, and how many rows each
    fired on, `[T]`.
  """
  module = batch.module
  (encoder,) = module.encoders
  keep = lambda a: a if filled_U is None else jnp.where(filled_U, a, 0)
  of = lambda z, vectors: module.codes(z, columns(module, vectors))
  codes, pull = jax.vjp(of, z_TU, {k: params[k] for k in module.vectors})
  seen = [*seen[:-1], seen[-1] + batch.l1]
  d_z, d_vectors = pull(tuple(keep(c).astype(z_TU.dtype) for c in seen))
  f = keep(codes[0])
  grads = d_vectors | {
    encoder: product(d_z, x_UD, module.precision),
    'W_dec': product(f, back_UD, module.precision),
  }
  return grads, jnp.sum(d_z, 1), jnp.sum(f > 0, 1, dtype=jnp.int32)


def step_on(walk: Walk, at: At, batch: Batch, params, found) -> Walk:
  """Behind some features, of which `found` are the `gradients`."""
  grads, d_z_T, fired_T = found
  (encoder,) = batch.module.encoders
  pulled_D = product(at.keep(d_z_T), at.keep(params[encoder]), 'float32')
  norm_T = jnp.linalg.norm(params['W_dec'], axis=-1)
  return Walk(
    batch.write(walk.carry, at, params, grads),
    walk.pulled_D + pulled_D,
    at.put(walk.fired_F, fired_T),
    jnp.maximum(walk.norm_error, jnp.max(at.keep(jnp.abs(norm_T - 1)))),
  )


class Forward(NamedTuple):
  """What a forward pass finds on a device.

  Attributes:
    decoded: what each code decodes to, `[B, D]` without bias.
    penalised: the sum of the last code.
    unions: of each tile of rows, whether each feature is open.
    kept: what the way back needs.
  """

  decoded: list[jax.Array]
  penalised: jax.Array
  unions: jax.Array
  kept: jax.Array


def there_and_back(
  forward: Callable[..., Forward],
  backward: Callable[[Batch, Carry, Forward], Walk],
  carry: Carry,
  x_BD: jax.Array,
  b_dec_D: jax.Array,
  *,
  module: nn.Module,
  l1: jax.Array,
  error_scale: Scalar,
  batch_size: int,
  write: Write,
) -> tuple[Sums, dict[str, jax.Array], jax.Array, Carry]:
  """Everything of a step, on one device of a mesh ('data', 'model').

  Args:
    forward: of module, parameters and rows without `b_dec`.
    backward: through all features, or those that matter.
    carry: handed through `write`. With several devices along 'data', what is
      written is of this device's rows alone.
    x_BD: this device's rows, scaled.
    b_dec_D: the bias.
    module: the architecture.
    l1: coefficient of the sparsity term.
    error_scale: of the squared errors.
    batch_size: B of the whole batch.
    write: what becomes of gradients.

  Returns:
    sums; `fired`, int32 `[F]`, and `norm_error`, of the decoder's rows that were
    written; the gradient of `b_dec`; the carry.
  """
  centred_BD = x_BD - b_dec_D[None]
  found = forward(module, carry.params, centred_BD)
  sums, back = _errors(found, x_BD, b_dec_D, error_scale, batch_size)
  batch = Batch(module, centred_BD, back, l1 / batch_size, write)
  walk = backward(batch, carry, found)
  d_b_dec_D = jax.lax.psum(jnp.sum(back[0], 0), 'data')
  d_b_dec_D -= jax.lax.psum(walk.pulled_D, _DEVICES)
  about = {
    'fired': jax.lax.psum(walk.fired_F, 'data'),
    'norm_error': jax.lax.pmax(walk.norm_error, _DEVICES),
  }
  return sums, about, d_b_dec_D, walk.carry


def _errors(found: Forward, x_BD, b_dec_D, error_scale, batch_size: int):
  """Sums, and the cotangents of what is decoded."""
  decoded = jax.lax.psum(found.decoded, 'model')
  errors = [d_BD + b_dec_D[None] - x_BD for d_BD in decoded]
  x_hat_BD = decoded[0] + b_dec_D[None]
  squares = jnp.stack([jnp.sum(e_BD**2) for e_BD in errors])
  over_rows = jax.lax.psum(
    (squares, jnp.sum(x_hat_BD**2), jnp.sum(x_hat_BD * x_BD)), 'data'
  )
  share = jnp.sum(found.unions, dtype=jnp.int32) / found.unions.size
  sums = Sums(
    reconstruction=over_rows[0][0],
    auxiliary=jnp.sum(over_rows[0][1:]),
    sparsity=jax.lax.psum(found.penalised, _DEVICES),
    x_hat_squared=over_rows[1],
    dot=over_rows[2],
    open_share=jax.lax.pmean(share, _DEVICES),
  )
  return sums, [(2 * error_scale / batch_size) * e_BD for e_BD in errors]
