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
from gsae_jax.sae.tiles import FEW, ROWS
from gsae_jax.training import state as state_lib
from gsae_jax.training.dense import Recipe
from gsae_jax.training.members import Member, make_member, make_recipe
from gsae_jax.training.state import MemberState
from gsae_jax.training.step import is_sound, train_step

# D * F * B below which several SAEs at once should keep a device busier: an
# estimate from what launching kernels takes on an H200, not a measurement.
_WORTH_STACKING = 1e11

# D * F * B from which a sparse step is worth the seconds that it takes to compile.
_WORTH_SPARSE = 2**28

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
    self.state = None
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
    self._save, self._restore = _converters(self.module, mesh, stacked)
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
    return 'sparse' if few else 'watched'

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
    return {
      m.name: self._save(self._state(i), m.hyper.scale)
      for i, m in enumerate(self.members)
    }

  def from_checkpoint(self, saved: dict[str, Any]) -> MemberState:
    """A member's state, of what was saved of it."""
    return self._restore(saved)

  def saved_shapes(self) -> dict[str, Any]:
    """Shapes of what is saved of a member, and where `put` takes it from."""
    shapes = state_lib.checkpoint_shapes(self.module)
    return state_lib.place(shapes, self._shardings(shapes, saved=True))

  def fresh(self, member: Member, baseline: Baseline) -> MemberState:
    """A member's state at step 0, born sharded; the same on any mesh."""
    state = _initializer(self.module, self._mesh, self._stacked)(
      state_lib.key_data(member.seed)
    )
    if member.config.baseline is None:
      return state
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
def _converters(module: nn.Module, mesh: Mesh, stacked: bool):
  """Compiled: what is saved of a state, and the state of that."""
  layout = 'gathered' if stacked else 'alone'
  place = functools.partial(state_lib.shardings, mesh, layout=layout)
  saved = place(state_lib.checkpoint_shapes(module), saved=True)
  return (
    jax.jit(state_lib.to_checkpoint, out_shardings=saved),
    jax.jit(
      state_lib.from_checkpoint,
      out_shardings=place(state_lib.member_shapes(module)),
    ),
  )


@functools.lru_cache(None)
def copier(mesh: Mesh) -> Callable[[Any], Any]:
  """Gives every process the whole of each array."""
  return jax.jit(lambda a: a, out_shardings=NamedSharding(mesh, P()))


def is_stacked(settings: TrainConfig, module: nn.Module, mesh: Mesh) -> bool:
  """Whether members of this shape are trained as a stack.

  On CPU that loses, to its caches; on an accelerator it gains as long as one
  member does not keep it busy.
  """
  if settings.members != 'auto':
    return settings.members == 'stacked'
  if mesh.shape['sae'] > 1:
    return True
  work = module.width * module.features * settings.batch_size
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  return not on_cpu and work < _WORTH_STACKING


def ways(
  settings: TrainConfig, module: nn.Module, mesh: Mesh, *, stacked: bool
) -> tuple[str, ...]:
  """Those of `train_step` that members of this shape may take.

  'auto' has two on CPUs, where that was measured, and for SAEs of some size.

  Raises:
    UserError: train.sparse is 'always', and it cannot be.
  """
  rows = settings.batch_size // settings.microbatches
  fits = rows % (ROWS * mesh.shape['data']) == 0
  can = module.is_exact_on_open_gates and not stacked and fits
  if settings.sparse == 'always':
    if not can:
      raise UserError(
        "train.sparse: 'always' is for members of architecture 'gated' or 'relu', "
        'not stacked, without an untied encoder and variants of the loss, and for '
        f'batches of a multiple of {ROWS} rows for every device along mesh.data '
        "and microbatch; set it to 'auto'"
      )
    return ('sparse',)
  work = module.width * module.features * rows
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  if settings.sparse == 'auto' and can and on_cpu and work >= _WORTH_SPARSE:
    return ('watched', 'sparse')
  return ('dense',)


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
  _check_sizes(by_module, settings, mesh)
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


def _check_sizes(by_module, settings, mesh) -> None:
  sae, data, model = (mesh.shape[k] for k in ('sae', 'data', 'model'))
  if settings.batch_size % data:
    raise UserError(
      f'train.batch_size: {settings.batch_size} is not divisible by mesh.data, '
      f'{data}'
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


def _of_members(fn: Callable[..., Any], mesh: Mesh, stacked: bool):
  """`fn(state, x_BD, hyper)` of a member alone, or of each of a stack.

  Returns:
    a function of state, a tuple of batches `[B, D]` and hyperparameters. Of a
    stack, each has the members in front, and `which` says whose batch is which;
    None is that all have the first.
  """

  def program(state, x, hyper, *, which):
    if not stacked:
      return fn(state, x[0], hyper)
    if which is None:
      return jax.vmap(fn, in_axes=(0, None, 0))(state, x[0], hyper)
    spread = NamedSharding(mesh, P('sae', 'data', None))
    x_SBD = jnp.stack([x[i] for i in which])
    x_SBD = jax.lax.with_sharding_constraint(x_SBD, spread)
    return jax.vmap(fn)(state, x_SBD, hyper)

  return program


def compile_step(
  module: nn.Module,
  recipe: Recipe,
  mesh: Mesh,
  *,
  stacked: bool,
  way: str = 'dense',
) -> Callable[..., Any]:
  """`train_step` under jit: donated, its outputs where its inputs were."""
  step = functools.partial(
    train_step, module=module, recipe=recipe, way=way, mesh=mesh
  )
  placed = state_lib.shardings(
    mesh,
    state_lib.member_shapes(module),
    layout='stacked' if stacked else 'alone',
  )
  return jax.jit(
    _of_members(step, mesh, stacked),
    donate_argnums=0,
    static_argnames='which',
    # Metrics stay where they were made: few are ever looked at.
    out_shardings=(placed, NamedSharding(mesh, P('sae') if stacked else P())),
  )


def compile_check(
  module: nn.Module, recipe: Recipe, mesh: Mesh, *, stacked: bool
) -> Callable[..., Any]:
  """`is_sound` under jit."""
  check = functools.partial(is_sound, module=module, recipe=recipe)
  return jax.jit(_of_members(check, mesh, stacked), static_argnames='which')
