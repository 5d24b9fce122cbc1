"""Chips that are not there, as the TPU's own compiler knows them."""

import dataclasses
import importlib.util
import math
import os
import re

# There is no TPU to ask about, nor one that two processes could both take.
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-8')

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from gsae_jax.errors import UserError  # noqa: E402
from launch import specs  # noqa: E402
from launch.preflight.roofline import CHIPS, Chip  # noqa: E402

# Of each generation, from few chips to many.
SLICES = {
  'v5e': ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
  'v5p': ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8'),
  'v6e': ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
}


@dataclasses.dataclass(frozen=True)
class Machine:
  """Chips of one kind, and the hosts that they hang on.

  Attributes:
    name: such as 'v5e:2x4' or 'v5p:2x2x2'.
    chip: what one of them has.
    bounds: chips along each axis of the network.
    host_bounds: those of one host, likewise.
  """

  name: str
  chip: Chip
  bounds: tuple[int, ...]
  host_bounds: tuple[int, ...]

  @property
  def chips(self) -> int:
    return math.prod(self.bounds)

  @property
  def hosts(self) -> int:
    return self.chips // math.prod(self.host_bounds)

  @property
  def host(self) -> 'Machine':
    """One host alone: a language model runs on the chips of one."""
    generation = self.name.partition(':')[0]
    shape = 'x'.join(str(n) for n in self.host_bounds)
    return dataclasses.replace(
      self, name=f'{generation}:{shape}', bounds=self.host_bounds
    )


def machine(name: str) -> Machine:
  """The machine of a topology's name.

  Raises:
    UserError: there is none of this name.
  """
  match = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)', name)
  if not match or match[1] not in CHIPS:
    specs.refuse_type(name, '--topology', CHIPS)
    known = ', '.join(f'{g}:{shapes[2]}' for g, shapes in SLICES.items())
    raise UserError(
      f'--topology: {name!r} is not known; give a generation of '
      f'{", ".join(CHIPS)} and the chips along each axis, as in {known}'
    )
  bounds = tuple(int(n) for n in match[2].split('x'))
  axes = len(SLICES[match[1]][0].split('x'))
  if len(bounds) != axes or min(bounds) < 1:
    raise UserError(
      f'--topology: {name!r} must have {axes} axes of one chip or more, as in '
      f'{match[1]}:{SLICES[match[1]][2]}'
    )
  return Machine(name, CHIPS[match[1]], bounds, _host(bounds))


def _host(bounds: tuple[int, ...]) -> tuple[int, ...]:
  """A host has 4 chips; 8 where 2 x 4 are all there are, and 1 where 1 is."""
  if math.prod(bounds) == 1 or bounds in ((2, 4), (4, 2)):
    return bounds
  return (2, 2, 1)[: len(bounds)]


def devices(of: Machine) -> list:
  """Its chips.

  Raises:
    UserError: the compiler is not there, or refuses them.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      "the TPU's compiler, libtpu, is not installed; on Linux, pip install "
      "'.[tpu]' (in the clone), or pip install --target DIR --no-deps libtpu of the "
      "version that the installed JAX's extra tpu names, and PYTHONPATH=DIR"
    )
  try:
    return topologies.get_topology_desc(
      platform='tpu',
      topology_name=of.name,
      chips_per_host_bounds=(*of.host_bounds, 1)[:3],
    ).devices
  except RuntimeError as e:  # And what derives from it.
    raise UserError(
      f'--topology: the compiler refuses {of.name!r} ({str(e).splitlines()[0]})'
    ) from e


def abstract(shape, dtype, sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
