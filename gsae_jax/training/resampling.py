"""Resampling of dead features (Bricken et al. 2023; paper D.1.1).

The paper does not say how a Gated SAE's own parameters are reset; here the
resampled feature starts as at initialisation: biases and r_mag at 0.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.activations.loader import Loader
from gsae_jax.activations.stream import Stream
from gsae_jax.config import TrainConfig
from gsae_jax.errors import Preempted
from gsae_jax.training.groups import Group
from gsae_jax.training.loss import losses
from gsae_jax.training.members import Member
from gsae_jax.training.schedule import Schedule
from gsae_jax.training.state import MemberState
from gsae_jax.training.step import Hyperparameters


def draw_rows(
  losses_N: np.ndarray, count: int, *, entropy: tuple[int, ...]
) -> np.ndarray:
  """Indices of `count` inputs, drawn with odds of their loss squared.

  An input is drawn once, unless there are fewer than asked for: two features
  that start from the same one would stay the same for ever. Those whose loss is
  not a number are left out. A function of the losses and of `entropy`: the
  member's key, and the step.
  """
  with np.errstate(over='ignore'):
    odds_N = losses_N.astype(np.float64) ** 2
  odds_N = np.where(np.isfinite(odds_N), odds_N, 0)
  if not odds_N.any():
    odds_N += 1
  with np.errstate(divide='ignore'):
    score_N = np.log(odds_N)
  # The largest of log odds plus Gumbel noise are a draw without replacement.
  score_N += np.random.default_rng(entropy).gumbel(size=len(odds_N))
  order = np.argsort(-score_N, kind='stable')
  return np.resize(order[: np.count_nonzero(odds_N)], count)


def row_losses(
  module: nn.Module,
  schedule: Schedule,
  state: MemberState,
  hyper: Hyperparameters,
  x_BD: jax.Array,
) -> jax.Array:
  """The loss (Eq. 4 or 8) of each row at this step, `[B]`."""
  x_BD = x_BD.astype(jnp.float32) * hyper.scale
  l1 = hyper.l1 * schedule.l1(state.step)
  return losses(module, state.params, x_BD, l1, hyper.error_scale)[0]


def resample(
  state: MemberState,
  dead_F: jax.Array,
  drawn_FD: jax.Array,
  *,
  module: nn.Module,
) -> MemberState:
  """Replaces the dead features.

  The decoder row becomes the drawn input's direction from `b_dec`, the encoder's
  the same at 0.2 of the mean norm of the alive ones; biases, r_mag and
  second moments of the feature are reset to 0. Adam's count is not, so the first
  updates of a fresh feature are up to 32 times the learning rate; the warm-up
  behind the event takes the edge off.

  Args:
    state: the member's.
    dead_F: bool `[F]`.
    drawn_FD: `[F, D]` scaled inputs; rows of alive features are ignored.
    module: the member's.
  """
  params = dict(state.params)
  direction_FD = drawn_FD - params['b_dec'][None]
  norm_F1 = jnp.linalg.norm(direction_FD, axis=-1, keepdims=True)
  direction_FD /= jnp.maximum(norm_F1, 1e-12)
  alive = jnp.sum(~dead_F)
  fresh = {'W_dec': direction_FD}
  for encoder in module.encoders:
    norms_F = jnp.linalg.norm(params[encoder], axis=-1)
    # With nobody alive, the directions themselves set the size.
    divisor = jnp.maximum(alive, 1).astype(norms_F.dtype)
    mean = jnp.sum(jnp.where(dead_F, 0, norms_F)) / divisor
    mean = jnp.where(alive > 0, mean, 1.0)
    fresh[encoder] = 0.2 * mean * direction_FD
  nu = dict(state.opt_state.nu)
  for name in params:
    if name == 'b_dec':
      continue
    dead = dead_F.reshape(-1, *(1,) * (params[name].ndim - 1))
    params[name] = jnp.where(dead, fresh.get(name, 0.0), params[name])
    nu[name] = jnp.where(dead, 0.0, nu[name])
  return state._replace(
    params=params,
    opt_state=state.opt_state._replace(nu=nu),
    steps_since_fired=jnp.where(dead_F, 0, state.steps_since_fired),
  )


@functools.lru_cache(None)
def _programs(module: nn.Module, schedule: Schedule, mesh: Mesh):
  """Compiled: who is silent for how long, losses of rows, resampling."""
  everywhere = NamedSharding(mesh, P())
  return (
    jax.jit(lambda state: state.steps_since_fired, out_shardings=everywhere),
    jax.jit(
      functools.partial(row_losses, module, schedule), out_shardings=everywhere
    ),
    jax.jit(functools.partial(resample, module=module)),
  )


def _global(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """The same array of every process, as one."""
  return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])


class Resampler:
  """Resamples the members of a run.

  The subset that losses are computed on is the batches that come next, read
  twice for each site: for the losses of all members, and for what was drawn.
  """

  def __init__(
    self,
    groups: list[Group],
    loader: Loader | Stream,
    settings: TrainConfig,
    schedule: Schedule,
    mesh: Mesh,
  ):
    # Whose features are frozen has none to resample.
    self._groups = [
      g for g in groups if not set(g.module.encoders) & set(g.module.frozen)
    ]
    self._loader = loader
    self._settings = settings
    self._programs = functools.partial(_programs, schedule=schedule, mesh=mesh)
    self._rows = NamedSharding(mesh, P('data'))

  def __call__(
    self, step: int, stopped: dict[str, Any], leaving: Callable[[], bool]
  ) -> list[dict[str, Any]]:
    """Replaces every member's dead features.

    Args:
      step: of the run.
      stopped: members to leave alone, by name.
      leaving: asked between batches.

    Returns:
      a record of each event.

    Raises:
      Preempted: `leaving` said so; nothing was replaced.
    """
    members: dict[str, Member] = {}
    states: dict[str, MemberState] = {}
    for group in self._groups:
      members |= {m.name: m for m in group.members if m.name not in stopped}
      states |= group.states()
    dead = {}
    for name, member in members.items():
      silent, _, _ = self._programs(member.module)
      silent_F = jax.device_get(silent(states[name]))
      dead[name] = silent_F >= self._settings.dead_after
    dying = {k: m for k, m in members.items() if dead[k].any()}
    drawn: dict[str, np.ndarray] = {}
    for site in dict.fromkeys(m.config.site for m in dying.values()):
      own = [m for m in dying.values() if m.config.site == site]
      drawn |= self._draw(step, site, own, dead, states, leaving)
    for name, drawn_FD in drawn.items():
      states[name] = self._replace(
        dying[name], states[name], dead[name], drawn_FD
      )
    for group in self._groups:
      if dying.keys() & set(group.names):
        group.put(states)
    return [
      {
        'step': step,
        'tokens': step * self._settings.batch_size,
        'member': name,
        'resampled': int(dead_F.sum()),
      }
      for name, dead_F in dead.items()
    ]

  def _draw(
    self,
    step: int,
    site: str,
    members: list[Member],
    dead: dict[str, np.ndarray],
    states: dict[str, MemberState],
    leaving: Callable[[], bool],
  ) -> dict[str, np.ndarray]:
    """For each member of a site, inputs `[F, D]` in its dead features' rows."""
    size = self._settings.batch_size
    batches = range(step, step + self._settings.resample_rows // size)
    losses: dict[str, list[np.ndarray]] = {m.name: [] for m in members}
    for rows_BD in self._rows_of(site, batches, leaving):
      x_BD = _global(rows_BD, self._rows)
      for m in members:
        _, row_losses, _ = self._programs(m.module)
        losses[m.name].append(
          jax.device_get(row_losses(states[m.name], m.hyper, x_BD))
        )
    rows, found = {}, {}
    for m in members:
      rng = jax.device_get(states[m.name].rng).tolist()
      rows[m.name] = draw_rows(
        np.concatenate(losses[m.name]),
        int(dead[m.name].sum()),
        entropy=(*rng, step),
      )
      shape = m.module.features, m.module.width
      found[m.name] = np.zeros(shape, np.float32)
    for i, rows_BD in enumerate(self._rows_of(site, batches, leaving)):
      for m in members:
        batch_of, row_of = np.divmod(rows[m.name], size)
        here = batch_of == i
        features = np.flatnonzero(dead[m.name])[here]
        found[m.name][features] = rows_BD[row_of[here]]
    return found

  def _rows_of(
    self, site: str, batches: range, leaving: Callable[[], bool]
  ) -> Iterator[np.ndarray]:
    for step in batches:
      if leaving():
        raise Preempted
      yield self._loader.rows_at(step, site)

  def _replace(
    self, m: Member, state: MemberState, dead_F, drawn_FD
  ) -> MemberState:
    _, _, resample = self._programs(m.module)
    where = jax.tree.map(lambda a: a.sharding, state)
    fresh = resample(
      state,
      _global(dead_F, where.steps_since_fired),
      _global(drawn_FD * m.hyper.scale, where.params['W_dec']),
    )
    return jax.device_put(fresh, where)
