"""Groups of SAEs that one program trains, with the arrays that they train."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.activations.store import Store, check_site
from gsae_jax.config import MemberConfig, TrainConfig
from gsae_jax.errors import UserError
from gsae_jax.sae.tiles import FEW
from gsae_jax.training import state as state_lib
from gsae_jax.training.members import Member, make_member, make_recipe
from gsae_jax.training.programs import (
  compile_check,
  compile_step,
  is_stacked,
  ways,
)
from gsae_jax.training.state import MemberState

Baseline = Callable[[MemberConfig], dict[str, np.ndarray]]


class Group:
  """Members of equal shape that one program trains: one alone, or a stack.

  Attributes:
    members: of the group.
    module: theirs.
    state: `MemberState`; of a stack, every leaf has the members in front.
  """

  def __init__(
    self, members: tuple[Member, ...], programs, mesh: Mesh, *, stacked: bool
  ):
    """Takes the members; `put` gives them their states."""
    self.members = members
    self.module = members[0].module
    self.names = tuple(m.name for m in members)
    self.state: MemberState
    self._shares: tuple[Any, ...]  # `open_share` of the last two steps.
    self._stacked = stacked
    self._steps, self._sound = programs
    self._mesh = mesh
    self._sites = tuple(dict.fromkeys(m.config.site for m in members))
    hypers = [m.hyper for m in members]
    layout = P('sae') if stacked else P()
    self._hyper = jax.device_put(
      jax.tree.map(lambda *v: np.stack(v), *hypers) if stacked else hypers[0],
      NamedSharding(mesh, layout),
    )
    which = tuple(self._sites.index(m.config.site) for m in members)
    self._which = which if len(self._sites) > 1 else None
    self._turn = functools.partial(_turner, mesh, stacked=stacked)
    if stacked:
      shapes = state_lib.member_shapes(self.module)
      self._stack = jax.jit(
        lambda states: jax.tree.map(lambda *a: jnp.stack(a), *states),
        out_shardings=state_lib.shardings(mesh, shapes, layout='stacked'),
      )
      self._take = jax.jit(
        lambda stack, i: jax.tree.map(lambda a: a[i], stack),
        out_shardings=self._shardings(shapes),
      )

  def _shardings(self, shapes: Any, *, saved: bool = False) -> Any:
    """Where something of one member is, outside the stack."""
    layout = 'gathered' if self._stacked else 'alone'
    return state_lib.shardings(self._mesh, shapes, layout=layout, saved=saved)

  def step(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Trains on a batch; returns metrics, of a stack with members in front."""
    x = tuple(batch[site] for site in self._sites)
    step = self._steps[self._way()]
    self.state, metrics = step(self.state, x, self._hyper, which=self._which)
    if 'open_share' in metrics:
      self._shares = self._shares[1], metrics['open_share']
    return metrics

  def _way(self) -> str:
    """How the next step is taken, by what was open two steps ago.

    That step is over, so nothing waits; and the state has the figure, so that a
    run which was stopped goes on as it would have.
    """
    if len(self._steps) == 1:
      return next(iter(self._steps))
    few = jax.device_get(self._shares[0]) < FEW
    return 'sparse' if few else 'blocked'

  def put(self, states: dict[str, MemberState]) -> None:
    """Takes over the states of all members."""
    parts = [states[name] for name in self.names]
    self.state = self._stack(parts) if self._stacked else parts[0]
    if not self._stacked:
      self._shares = tuple(jax.device_get(self.state.open_share))

  def states(self) -> dict[str, MemberState]:
    """Each member's own; of a member alone, not a copy."""
    return {m.name: self._state(i) for i, m in enumerate(self.members)}

  def _state(self, i: int) -> MemberState:
    return self._take(self.state, np.int32(i)) if self._stacked else self.state

  def to_checkpoint(self) -> dict[str, dict[str, Any]]:
    """What is saved of each member."""
    turn = self._turn(saved=True)
    return {
      m.name: state_lib.to_checkpoint(self._state(i), m.hyper.scale, turn)
      for i, m in enumerate(self.members)
    }

  def from_checkpoint(self, saved: dict[str, Any]) -> MemberState:
    """A member's state, of what was saved of it."""
    return state_lib.from_checkpoint(saved, self._turn(saved=False))

  def saved_shapes(self) -> dict[str, Any]:
    """Shapes of what is saved of a member, and where `put` takes it from."""
    shapes = state_lib.checkpoint_shapes(self.module)
    return state_lib.place(shapes, self._shardings(shapes, saved=True))

  def fresh(self, member: Member, baseline: Baseline | None) -> MemberState:
    """A member's state at step 0, born sharded; the same on any mesh."""
    state = _initializer(self.module, self._mesh, self._stacked)(
      state_lib.key_data(member.seed)
    )
    if member.config.baseline is None:
      return state
    assert baseline is not None
    raw = self.module.start(baseline(member.config))
    params = state_lib.turn(state_lib.fold_scale(raw, 1 / member.hyper.scale))
    return state._replace(
      params=jax.device_put(params, self._shardings(params))
    )

  def sound(self, batch: dict[str, jax.Array]) -> dict[str, bool]:
    """Whether each member's state, and its loss on a batch, are all numbers."""
    x = tuple(batch[site] for site in self._sites)
    found = self._sound(self.state, x, self._hyper, which=self._which)
    fine = jax.device_get(copier(self._mesh)(found))
    return dict(zip(self.names, np.atleast_1d(fine).tolist(), strict=True))

  def fired_counts(self) -> dict[str, np.ndarray]:
    """Rows that each feature of each member fired on, `[F]` int32."""
    counts = jax.device_get(copier(self._mesh)(self.state.fired_counts))
    counts_SF = counts if self._stacked else counts[None]
    return dict(zip(self.names, counts_SF, strict=True))


@functools.lru_cache(None)
def _initializer(module: nn.Module, mesh: Mesh, stacked: bool):
  placed = state_lib.shardings(
    mesh,
    state_lib.member_shapes(module),
    layout='gathered' if stacked else 'alone',
  )
  init = functools.partial(state_lib.init_member, module)
  return jax.jit(init, out_shardings=placed)


@functools.lru_cache(None)
def _turner(mesh: Mesh, saved: bool, stacked: bool):
  """Compiled `turn`, of arrays that are placed as those that are saved, or not."""

  @functools.lru_cache(None)
  def compiled(names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]):
    tree = {
      k: jax.ShapeDtypeStruct(v, np.float32)
      for k, v in zip(names, shapes, strict=True)
    }
    layout = 'gathered' if stacked else 'alone'
    turned = jax.eval_shape(state_lib.turn, tree)
    placed = state_lib.shardings(mesh, turned, layout=layout, saved=saved)
    return jax.jit(state_lib.turn, out_shardings=placed)

  def turn(tree: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The others pass as they are, so that they take no memory."""
    lying = {k: v for k, v in tree.items() if k in state_lib.TURNED}
    run = compiled(tuple(lying), tuple(v.shape for v in lying.values()))
    return tree | run(lying)

  return turn


@functools.lru_cache(None)
def copier(mesh: Mesh) -> Callable[[Any], Any]:
  """Gives every process the whole of each array."""
  return jax.jit(lambda a: a, out_shardings=NamedSharding(mesh, P()))


def make_groups(
  configs: tuple[MemberConfig, ...],
  settings: TrainConfig,
  store: Store,
  mesh: Mesh,
  seed: int,
) -> list[Group]:
  """The run's members, grouped, without states.

  Raises:
    UserError: the store lacks a site, or the mesh does not divide a size.
  """
  by_module: dict[nn.Module, list[Member]] = {}
  for config in configs:
    check_site(store, config.site, config.name)
    member = make_member(config, settings, store.sites[config.site], seed)
    by_module.setdefault(member.module, []).append(member)
  check_sizes(by_module, settings, mesh)
  recipe = make_recipe(settings)
  groups = []
  for module, members in by_module.items():
    stacked = is_stacked(settings, module, mesh)
    programs = (
      {
        way: compile_step(module, recipe, mesh, stacked=stacked, way=way)
        for way in ways(settings, module, mesh, stacked=stacked)
      },
      compile_check(module, recipe, mesh, stacked=stacked),
    )
    parts = [tuple(members)] if stacked else [(m,) for m in members]
    groups += [Group(part, programs, mesh, stacked=stacked) for part in parts]
  return groups


def check_sizes(
  by_module: dict[nn.Module, list[Member]], settings: TrainConfig, mesh: Mesh
) -> None:
  """Whether the mesh divides batches, features and members.

  Raises:
    UserError: names the size that it does not.
  """
  sae, data, model = (mesh.shape[k] for k in ('sae', 'data', 'model'))
  if settings.batch_size % (data * settings.microbatches):
    raise UserError(
      f'train.batch_size: {settings.batch_size} is not divisible by mesh.data, '
      f'{data}, times train.microbatches, {settings.microbatches}'
    )
  for module, members in by_module.items():
    first = members[0]
    if module.features % model:
      raise UserError(
        f'saes: member {first.name!r} has {module.features} features, not '
        f'divisible by mesh.model, {model}'
      )
    if len(members) % sae:
      raise UserError(
        f'saes: there are {len(members)} members of the shape of '
        f'{first.name!r}, not divisible by mesh.sae, {sae}'
      )
