"""Ranks the ways to divide training over chips, by a model of time and memory.

Nothing is compiled here. What it says of memory traffic and of temporaries was
fitted to programs that were (docs/preflight.md); states are exact. The best few
are compiled behind it.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from gsae_jax.config import Config
from gsae_jax.mesh import make_mesh
from gsae_jax.training import state as state_lib
from gsae_jax.training.programs import is_stacked
from launch.preflight import topology
from launch.preflight.products import Products
from launch.preflight.programs import Group
from launch.preflight.roofline import network_seconds
from launch.preflight.topology import Machine

# How often a step goes through the parameters, and through arrays `[B, F]` at
# least and for each product with the decoder.
_PARAMETER_PASSES, _CODE_PASSES, _DECODE_PASSES = 8, 2, 6
# Arrays `[B, F]` that it holds at the same time.
_CODES = 4


@dataclasses.dataclass(frozen=True)
class Estimate:
  """One way to divide a step of all SAEs.

  Attributes:
    sae: sizes of the mesh.
    data: as above.
    model: as above.
    seconds: of a step, compute, memory and network at the same time.
    needs: bytes of a chip.
  """

  sae: int
  data: int
  model: int
  seconds: float
  needs: float

  @property
  def sizes(self) -> tuple[int, int, int]:
    return self.sae, self.data, self.model

  def __str__(self) -> str:
    return f'sae={self.sae} data={self.data} model={self.model}'


@dataclasses.dataclass(frozen=True)
class Work:
  """What a run trains, whatever it is divided over.

  Attributes:
    config: the experiment.
    groups: its members.
    products: of a member's step, by group.
  """

  config: Config
  groups: Sequence[Group]
  products: Sequence[Products]

  def first(self, members: int) -> 'Work':
    """That of the first so many members, in the order of the config."""
    names = {m.name for m in self.config.saes[:members]}
    left = [
      (
        dataclasses.replace(
          g, members=tuple(m for m in g.members if m.name in names)
        ),
        p,
      )
      for g, p in zip(self.groups, self.products, strict=True)
    ]
    left = [(g, p) for g, p in left if g.members]
    return dataclasses.replace(
      self, groups=[g for g, _ in left], products=[p for _, p in left]
    )


def rank(work: Work, machine: Machine) -> list[Estimate]:
  """Every mesh over the chips that divides the sizes: what fits, fastest first."""
  found = [
    estimate(work, machine, *sizes)
    for sizes in _meshes(machine.chips)
    if divides(work, *sizes)
  ]
  usable = machine.chip.usable
  return sorted(found, key=lambda e: (e.needs > usable, e.seconds, e.sizes))


def _meshes(chips: int):
  divisors = [n for n in range(1, chips + 1) if chips % n == 0]
  for sae in divisors:
    for data in divisors:
      if chips % (sae * data) == 0:
        yield sae, data, chips // (sae * data)


def divides(work: Work, sae: int, data: int, model: int) -> bool:
  """Whether the sizes of a run can be divided so."""
  train = work.config.train
  return (
    (sae == 1 or train.members != 'looped')
    and train.batch_size % (data * train.microbatches) == 0
    and all(
      g.module.features % model == 0 and len(g.members) % sae == 0
      for g in work.groups
    )
  )


@functools.lru_cache(None)
def _mesh(machine: Machine, sae: int, data: int, model: int) -> Mesh:
  return make_mesh(data, model, sae, topology.devices(machine))


@functools.lru_cache(None)
def _bytes(module) -> tuple[int, int]:
  """Of a member's parameters, and of its state."""
  state = state_lib.member_shapes(module)
  size = lambda tree: sum(
    math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree)
  )
  return size(state.params), size(state)


def estimate(
  work: Work,
  machine: Machine,
  sae: int,
  data: int,
  model: int,
  *,
  microbatches: int | None = None,
) -> Estimate:
  """Time and memory of one mesh.

  Args:
    work: what is trained.
    machine: on which chips.
    sae: sizes of the mesh.
    data: as above.
    model: as above.
    microbatches: instead of the config's.
  """
  settings, chip = work.config.train, machine.chip
  mesh = _mesh(machine, sae, data, model)
  parts = microbatches or settings.microbatches
  seconds = held = most = 0.0
  widths: dict[str, int] = {}
  for group, products in zip(work.groups, work.products, strict=True):
    module = group.module
    stacked = is_stacked(settings, module, mesh)
    # Members that a chip takes part in, and of those the ones of one program.
    mine = len(group.members) / sae
    together = mine if stacked else 1
    params, state = (n / model for n in _bytes(module))
    rows = settings.batch_size / data
    codes = 4 * rows * module.features / model
    # The gated loss decodes twice.
    decodes = 2 if 'W_gate' in module.encoders else 1
    network = _seconds(
      machine, mesh, 'model', 4 * decodes * rows * module.width
    )
    network += _seconds(machine, mesh, 'data', params)
    passes = _CODE_PASSES + _DECODE_PASSES * decodes
    moved = _PARAMETER_PASSES * params + passes * codes
    seconds += mine * max(
      products.passes / (data * model) / chip.flops,
      moved / chip.bandwidth,
      network,
    )
    held += mine * state
    gradients = params * (1 if parts == 1 else 2)
    most = max(most, together * (gradients + _CODES * codes / parts))
    widths |= dict.fromkeys(group.sites, module.width)
  batches = 2 * 4 * settings.batch_size / data * sum(widths.values())
  return Estimate(sae, data, model, seconds, held + most + batches)


def _seconds(machine: Machine, mesh: Mesh, axis: str, size: float) -> float:
  """Of an all-reduce along an axis."""
  if mesh.shape[axis] == 1:
    return 0.0
  last = np.moveaxis(mesh.devices, list(mesh.shape).index(axis), -1)
  places = np.array([d.coords for d in last.flat])
  groups = places.reshape(-1, mesh.shape[axis], places.shape[-1])
  return network_seconds(
    'all-reduce', size, groups, machine.bounds, machine.chip
  )
