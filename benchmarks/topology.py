"""What the TPU's own compiler says of a program, without a TPU."""

import collections
import dataclasses
import math
import os
import re

# There is no TPU to ask about, nor one that two processes could both take.
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import mesh_utils, topologies  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

_COLLECTIVE = re.compile(
  r' = (?P<shape>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|'
  r'collective-permute)(?P<start>-start)?\(.*channel_id=(?P<channel>\d+)'
)
_GROUPS = re.compile(
  r'(?:replica_groups|source_target_pairs)=(.*?)(?:, \w+=(?!\()|$)'
)
_NAMED_AXES = re.compile(
  r'mesh\[(?P<sizes>[^]]*)\](?:, device_ids=\((?P<ids>.*)\))? \{(?P<axes>.*)\}'
)
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\](\{[^}]*\})?')
_BYTES = {'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'pred': 1}
# These only name what is there, or end what has been counted at its start.
_FREE = re.compile(
  r'parameter|constant|tuple|get-tuple-element|bitcast|.*-done'
)


def abstract(shape, dtype, sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def devices(topology: str) -> list:
  """Chips of a topology, such as 'v5e:2x4' or 'v5p:2x2x2'."""
  alone = {'chips_per_host_bounds': (1, 1, 1)}  # Else it is a host of four.
  return topologies.get_topology_desc(
    platform='tpu',
    topology_name=topology,
    **(alone if math.prod(bounds(topology)) == 1 else {}),
  ).devices


def bounds(topology: str) -> tuple[int, ...]:
  """Chips along each axis of the network."""
  return tuple(int(n) for n in topology.partition(':')[2].split('x'))


def make_mesh(chips: list, sae: int, data: int, model: int) -> Mesh:
  """The mesh of `gsae_jax.mesh`, of chips that are not there."""
  sizes = {'sae': sae, 'data': data, 'model': model}
  placed = mesh_utils.create_device_mesh(
    tuple(sizes.values()), chips, allow_split_physical_axes=True
  )
  auto = (jax.sharding.AxisType.Auto,) * 3
  return Mesh(placed, tuple(sizes), axis_types=auto)


@dataclasses.dataclass(frozen=True)
class Collective:
  """Of one channel.

  Attributes:
    kind: 'all-reduce', 'all-gather', ...
    size: bytes that come out of it, on a chip.
    groups: which devices take part, as the compiler writes it.
  """

  kind: str
  size: int
  groups: str


def collectives(text: str) -> list[Collective]:
  """Of a compiled program.

  The compiler spreads one over several computations; its channel is one.
  """
  found = {}
  for line in text.splitlines():
    match = _COLLECTIVE.search(line)
    if match:
      sizes = [size for size, _ in _arrays(match['shape'])]
      size = sizes[-1] if match['start'] else sum(sizes)
      groups = _GROUPS.search(line)
      found[match['channel']] = Collective(
        match['kind'], size, groups[1] if groups else '{}'
      )
  return list(found.values())


def totals(found: list[Collective]) -> dict[str, tuple[int, int]]:
  """How many there are of each kind, and the bytes that come out of them."""
  counts = collections.Counter(c.kind for c in found)
  return {
    kind: (count, sum(c.size for c in found if c.kind == kind))
    for kind, count in counts.items()
  }


def _arrays(shape: str) -> list[tuple[int, str]]:
  """Bytes and layout of each array of a shape, which may be a tuple."""
  return [
    (_BYTES[dtype] * math.prod(int(n) for n in dims.split(',') if n), layout)
    for dtype, dims, layout in _ARRAY.findall(shape)
    if dtype in _BYTES
  ]


def first_group(groups: str, count: int) -> np.ndarray:
  """Numbers of the devices of one group, in the order of the mesh.

  Args:
    groups: of a `Collective`; the compiler has three ways to write them.
    count: of all devices.

  Raises:
    ValueError: it has a fourth.
  """
  everyone = np.arange(count)
  if groups.startswith('{'):
    members = re.match(r'\{\{?([\d,]*)\}', groups)[1]
    return (
      np.array([int(n) for n in members.split(',')]) if members else everyone
    )
  if '<=' in groups:
    size = int(re.match(r'\[\d+,(\d+)\]<=', groups)[1])
    return _permuted(groups.partition('<=')[2], everyone)[:size]
  named = _NAMED_AXES.fullmatch(groups)
  axes = named and re.findall(r"'(\w+)'(?=,|$)", named['axes'])
  if not named or len(axes) != named['axes'].count(',') + 1:
    raise ValueError(f'groups of a form that is not known: {groups}')
  sizes = dict(re.findall(r"'(\w+)'=(\d+)", named['sizes']))
  ids = _permuted(named['ids'], everyone) if named['ids'] else everyone
  ids = ids.reshape([int(n) for n in sizes.values()])
  return ids[tuple(slice(None) if a in axes else 0 for a in sizes)].ravel()


def _permuted(text: str, ids: np.ndarray) -> np.ndarray:
  """`[2,4]T(1,0)` of device numbers, flat."""
  shape, _, order = text.partition('T')
  numbers = lambda s: [int(n) for n in re.findall(r'\d+', s)]
  ids = ids.reshape(numbers(shape))
  return (ids.transpose(numbers(order)) if order else ids).ravel()


def axes_of(group: np.ndarray, sizes: dict[str, int]) -> tuple[str, ...]:
  """Axes of the mesh along which the devices of a group differ."""
  places = np.unravel_index(group, tuple(sizes.values()))
  return tuple(
    name
    for name, along in zip(sizes, places, strict=True)
    if len(set(along.tolist())) > 1
  )


def memory_bytes(text: str) -> int:
  """Bytes that a program reads from a chip's memory and writes to it.

  What `cost_analysis` calls bytes accessed counts what lies on the chip itself
  ('S(1)') too, and copies between the two once at each end.
  """
  entry = text[text.index('\nENTRY') :]
  lines = re.findall(r'%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)', entry)
  held, total = {}, 0
  for name, shape, operation, rest in lines:
    arrays = _arrays(shape)
    outside = sum(size for size, layout in arrays if 'S(' not in layout)
    held[name] = outside
    if _FREE.fullmatch(operation):
      continue
    if operation.endswith('-start'):
      # In or out, once: of a slice, what is taken.
      sizes = (size for size, layout in arrays if 'S(2)' not in layout)
      total += min(sizes, default=0)
    else:
      read = re.findall(r'%([\w.\-]+)', rest.partition(')')[0])
      total += outside + sum(held.get(operand, 0) for operand in read)
  return total
