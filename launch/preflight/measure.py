"""What one program takes of a chip, and what of that bounds it."""

import dataclasses
import functools
import re
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from launch.preflight import products
from launch.preflight.compiled import Text, axes_of, groups_of
from launch.preflight.roofline import network_seconds, wire_bytes
from launch.preflight.topology import Machine

_LACKING = re.compile(
  r'Used (\S+) of (\S+) hbm|'
  r'\((\d[\d.]*\w)\) exceeds available HBM \((\d[\d.]*\w)\)'
)
_UNITS = {'B': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """One program of a part of the package, on a mesh of chips.

  Attributes:
    part: 'harvest', 'train' or 'evaluate'.
    name: which of its programs.
    machine: whose network the mesh lies in.
    mesh: of all devices that take part.
    tokens: of one run of it.
    runs: in one turn of the part: a pass, a step or a batch.
    fn: jitted or pmapped.
    args: abstract.
    kwargs: static.
    key: what of it `fn` was made of; on one mesh, programs with equal keys and
      arguments are one. None where it was made of something else.
  """

  part: str
  name: str
  machine: Machine
  mesh: Mesh
  tokens: int
  runs: float
  fn: jax.stages.Wrapped
  args: tuple[Any, ...]
  kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
  key: Hashable = None

  def products(self) -> products.Products:
    return products.count(self.fn, *self.args, **self.kwargs)

  def compile(self) -> jax.stages.Compiled:
    return self.fn.lower(*self.args, **self.kwargs).compile()


class DoesNotFit(Exception):
  """The compiler says that a program needs more memory than a chip has.

  Attributes:
    needs: bytes.
    words: what it needs and what there is, as the compiler writes it.
  """

  def __init__(self, needs: str, has: str):
    super().__init__(f'needs {needs} of {has}')
    self.needs = float(needs[:-1]) * _UNITS[needs[-1]]
    self.words = {'needs': needs, 'has': has}


@functools.lru_cache(1)  # To find how many contexts fit, one was compiled.
def compiled(program: Program) -> jax.stages.Compiled:
  """The program, compiled.

  Raises:
    DoesNotFit: it is larger than a chip.
  """
  try:
    return program.compile()
  except jax.errors.JaxRuntimeError as error:
    found = _LACKING.search(str(error))
    if not found:
      raise
    raise DoesNotFit(*(g for g in found.groups() if g)) from error


def measure(program: Program) -> dict[str, Any]:
  """What a chip computes, moves, sends and holds, as plain data.

  Of operations the larger of two counts is taken: the compiler's, which has the
  body of a loop once, and that of the products as they are written, shared
  among all chips, which lacks what is made twice.

  Raises:
    DoesNotFit: it is larger than a chip.
  """
  chip = program.machine.chip
  written = program.products()
  built = compiled(program)
  hlo, memory = built.as_text(), built.memory_analysis()
  cost = built.cost_analysis()
  # A TPU's compiler tells all three.
  assert hlo is not None and memory is not None and cost is not None
  text = Text(hlo)
  flops = max(cost['flops'], written.flops / program.mesh.size)
  moved = text.memory_bytes()
  collectives = sent(program, text)
  passes = written.passes / written.flops if written.flops else 1.0
  return {
    'flops_per_chip': flops,
    'memory_bytes': moved,
    'collectives': collectives,
    'held': {
      'arguments': memory.argument_size_in_bytes,
      'temporary': memory.temp_size_in_bytes,
      'output': memory.output_size_in_bytes,
      'code': memory.generated_code_size_in_bytes,
      'peak': memory.peak_memory_in_bytes,
    },
    'seconds': {
      'compute': flops * passes / chip.flops,
      'memory': moved / chip.bandwidth,
      'network': sum(c['seconds'] for c in collectives),
    },
  }


def sent(program: Program, text: Text) -> list[dict[str, Any]]:
  """Collectives of a compiled program, by kind and by axis of the mesh."""
  chip, mesh = program.machine.chip, program.mesh
  found: dict[tuple[str, str], dict[str, Any]] = {}
  places = np.array([d.coords for d in mesh.devices.flat])
  for one in text.collectives():
    groups = groups_of(one.groups, mesh.size)
    if groups.shape[1] < 2:
      continue
    axes = ' x '.join(axes_of(groups[0], dict(mesh.shape)))
    row = found.setdefault(
      (one.kind, axes),
      {'kind': one.kind, 'axis': axes}
      | dict.fromkeys(('count', 'bytes', 'wire_bytes', 'seconds'), 0),
    )
    row['count'] += one.times
    row['bytes'] += one.times * one.size
    row['wire_bytes'] += one.times * wire_bytes(
      one.kind, one.size, groups.shape[1]
    )
    row['seconds'] += one.times * network_seconds(
      one.kind, one.size, places[groups], program.machine.bounds, chip
    )
  return sorted(found.values(), key=lambda row: -row['bytes'])
