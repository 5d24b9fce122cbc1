"""Resampling of dead features (Bricken et al. 2023; paper D.1.1).

The paper does not say how a Gated SAE's own parameters are reset; here the
resampled feature starts as at initialisation: biases and r_mag at 0.
"""

import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax.activations.loader import Loader
from gsae_jax.activations.stream import Stream
from gsae_jax.config import TrainConfig
from gsae_jax.training.members import Member
from gsae_jax.training.state import MemberState


def draw_rows(
  losses_N: np.ndarray, count: int, *, entropy: tuple[int, ...]
) -> np.ndarray:
  """Indices of `count` inputs, each drawn with odds of its loss squared.

  A function of the losses and of `entropy`: the run's key, step and member.
  """
  odds_N = losses_N.astype(np.float64) ** 2
  rng = np.random.default_rng(entropy)
  return rng.choice(len(odds_N), size=count, p=odds_N / odds_N.sum())


def row_losses(
  module: nn.Module, params: dict[str, jax.Array], x_BD: jax.Array, scale
) -> jax.Array:
  """`||x - x_hat||^2` of each row, `[B]`."""
  x_BD = x_BD.astype(jnp.float32) * scale
  x_hat_BD = module.apply({'params': params}, x_BD)['x_hat']
  return jnp.sum((x_BD - x_hat_BD) ** 2, -1)


def resample(
  state: MemberState,
  dead_F: jax.Array,
  drawn_FD: jax.Array,
  *,
  encoder: str,
) -> MemberState:
  """Replaces the dead features.

  The decoder row becomes the drawn input's direction from `b_dec`, the encoder
  column the same at 0.2 of the mean norm of the alive ones; biases, r_mag and
  second moments of the feature are reset to 0. Adam's count is not, so the first
  updates of a fresh feature are up to 32 times the learning rate; the warm-up
  behind the event takes the edge off.

  Args:
    state: the member's.
    dead_F: bool `[F]`.
    drawn_FD: `[F, D]` scaled inputs; rows of alive features are ignored.
    encoder: name of the encoder parameter.
  """
  params = dict(state.params)
  direction_FD = drawn_FD - params['b_dec']
  norm_F1 = jnp.linalg.norm(direction_FD, axis=-1, keepdims=True)
  direction_FD /= jnp.maximum(norm_F1, 1e-12)
  norms_F = jnp.linalg.norm(params[encoder], axis=0)
  alive = jnp.sum(~dead_F)
  # With nobody alive, the directions themselves set the size.
  mean = jnp.sum(jnp.where(dead_F, 0, norms_F)) / jnp.maximum(alive, 1)
  mean = jnp.where(alive > 0, mean, 1.0)
  fresh = {
    'W_dec': direction_FD,
    encoder: 0.2 * mean * direction_FD.T,
  }
  # Features are the last axis of everything but the decoder.
  nu = dict(state.opt_state.nu)
  for name in params:
    if name == 'b_dec':
      continue
    dead = dead_F[:, None] if name == 'W_dec' else dead_F
    params[name] = jnp.where(dead, fresh.get(name, 0.0), params[name])
    nu[name] = jnp.where(dead, 0.0, nu[name])
  return state._replace(
    params=params,
    opt_state=state.opt_state._replace(nu=nu),
    steps_since_fired=jnp.where(dead_F, 0, state.steps_since_fired),
  )


_row_losses = jax.jit(row_losses, static_argnums=0)
_resample = jax.jit(resample, static_argnames='encoder')


def resample_members(
  run: list[Member],
  loader: Loader | Stream,
  settings: TrainConfig,
  step: int,
  entropy: tuple[int, ...],
) -> list[dict[str, Any]]:
  """Resamples every member's dead features; returns a record of each event.

  The subset that losses are computed on is the batches that come next, read
  twice: for the losses of all members, and for what was drawn. A member's draws
  depend on its name, not on its company.
  """
  batches = range(step, step + settings.resample_rows // settings.batch_size)
  dead = {
    m.config.name: jax.device_get(m.state.steps_since_fired)
    >= settings.dead_after
    for m in run
  }
  dying = [m for m in run if dead[m.config.name].any()]
  losses = {m.config.name: [] for m in dying}
  for b in batches if dying else ():
    for m in dying:
      x_BD = loader.rows_at(b, m.config.site)
      losses[m.config.name].append(
        _row_losses(m.module, m.state.params, x_BD, m.hyper.scale)
      )
  drawn, found = {}, {}
  for m in dying:
    name = m.config.name
    drawn[name] = draw_rows(
      np.concatenate(losses[name]),
      int(dead[name].sum()),
      entropy=(*entropy, zlib.crc32(name.encode())),
    )
    found[name] = np.zeros((len(drawn[name]), m.module.width), np.float32)
  for b in batches if dying else ():
    for m in dying:
      batch_of, row_of = np.divmod(drawn[m.config.name], settings.batch_size)
      here = batch_of == b - step
      if here.any():
        x_BD = loader.rows_at(b, m.config.site)
        found[m.config.name][here] = x_BD[row_of[here]]
  for m in dying:
    dead_F = dead[m.config.name]
    drawn_FD = np.zeros((m.module.features, m.module.width), np.float32)
    drawn_FD[dead_F] = found[m.config.name] * float(m.hyper.scale)
    placed = jax.tree.map(lambda a: a.sharding, m.state)
    fresh = _resample(m.state, dead_F, drawn_FD, encoder=m.module.encoder)
    m.state = jax.device_put(fresh, placed)
  return [
    {
      'step': step,
      'tokens': step * settings.batch_size,
      'member': name,
      'resampled': int(dead_F.sum()),
    }
    for name, dead_F in dead.items()
  ]
