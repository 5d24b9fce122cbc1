"""The programs of harvest and of training, of shapes that lie nowhere."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.activations.forward import fitting, make_forward
from gsae_jax.activations.store import Site
from gsae_jax.config import Config
from gsae_jax.errors import UserError
from gsae_jax.lm.weights import DTYPES
from gsae_jax.training import groups as groups_lib
from gsae_jax.training import state as state_lib
from gsae_jax.training.members import Member, make_member, make_recipe
from gsae_jax.training.programs import compile_step, is_stacked, ways
from gsae_jax.training.step import Hyperparameters
from launch.preflight.measure import DoesNotFit, Program, compiled
from launch.preflight.model import Model, layout_of, place
from launch.preflight.topology import Machine, abstract


@dataclasses.dataclass(frozen=True)
class Group:
  """Members of a run that share a program.

  Attributes:
    members: of equal shape.
    stacked: whether one program trains them all.
  """

  members: tuple[Member, ...]
  stacked: bool

  @property
  def module(self) -> nn.Module:
    return self.members[0].module

  @property
  def sites(self) -> tuple[str, ...]:
    return tuple(dict.fromkeys(m.config.site for m in self.members))

  def __str__(self) -> str:
    first = self.members[0].config
    count = f'{len(self.members)} ' if self.stacked else ''
    return f'{count}{first.architecture} {first.features:,}'


def groups(config: Config, widths: dict[str, int], mesh: Mesh) -> list[Group]:
  """What `make_groups` makes of a config's members.

  Args:
    config: the experiment.
    widths: D by site.
    mesh: what training is divided over.

  Raises:
    UserError: the mesh does not divide a size.
  """
  by_module: dict[nn.Module, list[Member]] = {}
  for member in config.saes:
    width = widths[member.site]
    # Statistics change numbers in a program, not the program.
    site = Site(width, np.zeros(width), 1.0, 1.0, None)
    made = make_member(member, config.train, site, config.seed)
    by_module.setdefault(made.module, []).append(made)
  groups_lib.check_sizes(by_module, config.train, mesh)
  return [
    Group(tuple(members), is_stacked(config.train, module, mesh))
    for module, members in by_module.items()
  ]


def step(group: Group, config: Config, machine: Machine, mesh: Mesh) -> Program:
  """The train step of a group, as gsae_jax.train compiles it."""
  module, stacked = group.module, group.stacked
  front = (len(group.members),) if stacked else ()
  shapes = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct((*front, *a.shape), a.dtype),
    state_lib.member_shapes(module),
  )
  layout = 'stacked' if stacked else 'alone'
  state = state_lib.place(
    shapes, state_lib.shardings(mesh, shapes, layout=layout)
  )
  # The loader decodes what it was told the mean of.
  dtype = jnp.float32 if config.store.centre else DTYPES[config.store.dtype]
  x_BD = abstract(
    (config.train.batch_size, module.width),
    dtype,
    NamedSharding(mesh, P('data', None)),
  )
  spread = NamedSharding(mesh, P('sae') if stacked else P())
  scalar = abstract(front, jnp.float32, spread)
  sites = group.sites if stacked else group.sites[:1]
  which = tuple(sites.index(m.config.site) for m in group.members if stacked)
  # On TPUs there is one way only.
  way = ways(config.train, module, mesh, stacked=stacked)[0]
  return Program(
    part='train',
    name=f'step, {group}',
    machine=machine,
    mesh=mesh,
    tokens=config.train.batch_size,
    runs=1 if stacked else len(group.members),
    fn=compile_step(
      module, make_recipe(config.train), mesh, stacked=stacked, way=way
    ),
    args=(
      state,
      (x_BD,) * len(sites),
      Hyperparameters._make([scalar] * len(Hyperparameters._fields)),
    ),
    kwargs={'which': which if len(sites) > 1 else None},
    key=(module, make_recipe(config.train), stacked, way),
  )


def forward(config: Config, model: Model, machine: Machine) -> Program:
  """The pass of the model that harvest runs, on the chips of one host.

  Where the config leaves their number open, it has as many contexts as fit,
  which is found as harvest does, by compiling.
  """
  host = machine.host
  layout = layout_of(config.lm.layout, model, host, config.mesh.model)
  length = config.text.context_length
  check_length(config, model)
  sites = config.sites
  widths = model.widths(sites)
  run = make_forward(model.module, layout, sites)
  params = model.params(
    place(layout), model.module.config.blocks_for(config.sites)
  )

  dtype = DTYPES[config.store.dtype]
  encodings = dict.fromkeys(sites)
  if config.store.centre:
    one = lambda shape: abstract(shape, jnp.float32, layout.everywhere)
    encodings = {s: (one((width,)), one(())) for s, width in widths.items()}

  @functools.lru_cache(None)
  def with_contexts(contexts: int) -> Program:
    batch = contexts * layout.parts
    ids = abstract((batch, length), np.int32, layout.contexts)
    return Program(
      part='harvest',
      name=f'forward, {batch} x {length}, {layout.kind}',
      machine=host,
      mesh=layout.mesh,
      tokens=batch * length,
      runs=1,
      fn=run,
      args=(params, ids, encodings),
      kwargs={'dtype': dtype},
    )

  # Means are taken of float32, of which results are larger.
  larger = 4 // np.dtype(dtype).itemsize if config.store.centre else 1

  def needed(contexts: int) -> float:
    try:
      found = compiled(with_contexts(contexts)).memory_analysis()
    except DoesNotFit as error:
      return error.needs
    assert found is not None  # A TPU's compiler tells.
    results = 2 * larger * found.output_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + results

  contexts = config.store.batch_contexts
  if contexts is None:
    contexts = fitting(needed, int(machine.chip.usable), length)
  return with_contexts(contexts)


def check_length(config: Config, model: Model) -> None:
  """Raises UserError where contexts are longer than the model can read."""
  most = model.module.config.context
  if config.text.context_length > most:
    raise UserError(
      f'text.context_length: {config.text.context_length} is more than the '
      f'language model takes, {most}'
    )
