"""What would fit where something does not: changes, and the compiler on each."""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import jax

from gsae_jax.config import Config
from gsae_jax.errors import UserError
from gsae_jax.mesh import make_mesh
from launch.preflight import meshes, parts, topology
from launch.preflight.measure import Program, measure
from launch.preflight.model import Model, layout_of
from launch.preflight.roofline import CHIPS, GIB
from launch.preflight.topology import Machine

# Of a kind of changes, if the model of memory was wrong about the first.
_TRIES = 3


@dataclasses.dataclass(frozen=True)
class Remedy:
  """A change after which a part may fit.

  Attributes:
    words: the change.
    config: the experiment with it.
    machine: the chips with it.
    sizes: of the mesh of training.
  """

  words: str
  config: Config
  machine: Machine
  sizes: tuple[int, int, int] | None = None


def of_training(
  work: meshes.Work, machine: Machine, now: meshes.Estimate, beside: float = 0
) -> list[Iterator[Remedy]]:
  """What would fit by the model of memory, where the config's mesh does not.

  Args:
    work: what is trained.
    machine: on which chips.
    now: the config's mesh.
    beside: bytes of a chip that a language model takes, which training has along;
      then it has one host only.

  Returns:
    A list of each kind, the least change first.
  """
  room = machine.chip.usable - beside
  return [
    _other_meshes(work, machine, now, room),
    _microbatches(work, machine, now, room),
    _fewer_saes(work, machine, now, room),
    _more_chips(work, machine, room, hosts=1 if beside else None),
  ]


def _other_meshes(
  work: meshes.Work, machine: Machine, now: meshes.Estimate, room
):
  for other in meshes.rank(work, machine):
    if other.needs <= room and other.sizes != now.sizes:
      words = f'mesh {other} on the same chips'
      yield Remedy(words, work.config, machine, other.sizes)


def _microbatches(
  work: meshes.Work, machine: Machine, now: meshes.Estimate, room
):
  train = work.config.train
  parts = 2 * train.microbatches
  while train.batch_size % (now.data * parts) == 0:
    smaller = meshes.estimate(work, machine, *now.sizes, microbatches=parts)
    if smaller.needs <= room:
      changed = dataclasses.replace(train, microbatches=parts)
      config = dataclasses.replace(work.config, train=changed)
      yield Remedy(f'train.microbatches={parts}', config, machine, now.sizes)
    parts *= 2


def _fewer_saes(
  work: meshes.Work, machine: Machine, now: meshes.Estimate, room
):
  saes = work.config.saes
  for count in range(len(saes) - 1, 0, -1):
    few = work.first(count)
    if meshes.divides(few, *now.sizes):
      if meshes.estimate(few, machine, *now.sizes).needs <= room:
        config = dataclasses.replace(work.config, saes=saes[:count])
        words = f'{count} of the {len(saes)} SAEs at a time'
        yield Remedy(words, config, machine, now.sizes)


def _more_chips(work: meshes.Work, machine: Machine, room, hosts: int | None):
  for name in _larger(machine):
    more = topology.machine(name)
    if hosts and more.hosts > hosts:
      continue
    best = meshes.rank(work, more)
    if best and best[0].needs <= room:
      words = f'{name} with mesh {best[0]}'
      yield Remedy(words, work.config, more, best[0].sizes)


def _larger(machine: Machine) -> list[str]:
  """Topologies of the same chips, of more of them."""
  generation = machine.name.partition(':')[0]
  names = [f'{generation}:{shape}' for shape in topology.SLICES[generation]]
  return [n for n in names if topology.machine(n).chips > machine.chips]


class Steps:
  """Trainings with one language model, each program compiled once."""

  def __init__(self, model: Model):
    self._model = model
    self._measured: dict[Hashable, dict[str, Any]] = {}

  def measure(self, program: Program) -> dict[str, Any]:
    """`measure.measure`, of train steps once."""
    if program.key is None:
      return measure(program)
    leaves, tree = jax.tree.flatten(program.args)
    shapes = tuple((a.shape, str(a.dtype), a.sharding) for a in leaves)
    static = tuple(program.kwargs.items())
    key = program.machine.name, program.key, str(tree), shapes, static
    if key not in self._measured:
      self._measured[key] = measure(program)
    return self._measured[key]

  def total(
    self, config: Config, machine: Machine, sizes: tuple[int, int, int]
  ) -> dict[str, Any]:
    """`parts.total` of training over a mesh of such sizes."""
    sae, data, model = sizes
    mesh = make_mesh(data, model, sae, topology.devices(machine))
    part = parts.train(config, self._model, machine, mesh)
    rows = list(parts.measured(part, self.measure))
    return parts.total(part, rows, machine)


def of_pass(
  name: str, needs: float, config: Config, model: Model, machine: Machine
) -> list[Iterator[Remedy]]:
  """What makes a language model's programs smaller, as `of_training` has it.

  Args:
    name: 'harvest' or 'evaluate'.
    needs: bytes of a chip, as the config is.
    config: the experiment.
    model: its language model.
    machine: the chips.
  """
  layout = layout_of(config.lm.layout, model, machine.host, config.mesh.model)
  found = []
  if layout.kind != 'fully_sharded' and layout.mesh.size > 1:
    changed = dataclasses.replace(config.lm, layout='fully_sharded')
    config_ = dataclasses.replace(config, lm=changed)
    found.append(iter([Remedy('lm.layout=fully_sharded', config_, machine)]))
  found.append(_fewer_contexts(name, needs, config, machine, layout.parts))
  found.append(_other_chips(config, machine))
  return found


def _fewer_contexts(
  name: str, needs: float, config: Config, machine: Machine, parts: int
):
  section, field, least = {
    'harvest': ('store', 'batch_contexts', 1),
    'evaluate': ('eval', 'batch_size', parts),
  }[name]
  settings = getattr(config, section)
  count = getattr(settings, field) or least
  most = count * machine.chip.usable / needs  # Were it all of contexts.
  while count > least:
    count = max(count // 2, least)
    if count <= max(most, least):
      changed = dataclasses.replace(settings, **{field: count})
      config_ = dataclasses.replace(config, **{section: changed})
      yield Remedy(f'{section}.{field}={count}', config_, machine)


def _other_chips(config: Config, machine: Machine):
  for generation, chip in CHIPS.items():
    if chip.usable > machine.chip.usable:
      slices = (f'{generation}:{s}' for s in topology.SLICES[generation])
      more = (
        m for m in map(topology.machine, slices) if m.chips >= machine.chips
      )
      for other in itertools.islice(more, 1):
        yield Remedy(other.name, config, other)


def confirmed(
  kinds: Iterable[Iterator[Remedy]],
  total: Callable[[Remedy], dict[str, Any]],
  say: Callable[[str], None],
) -> list[str]:
  """The first of each kind that fits when it is compiled, with its memory.

  Args:
    kinds: changes.
    total: compiles one; as `parts.total`.
    say: is told of each.
  """
  found = []
  for kind in kinds:
    for remedy in itertools.islice(kind, _TRIES):
      say(f'compiling what may fit: {remedy.words}')
      try:
        now = total(remedy)
      except UserError:  # Sizes that it does not divide.
        continue
      if now['fits']:
        found.append(f'{remedy.words} ({now["needs"] / GIB:.2f} GiB)')
        break
  return found
