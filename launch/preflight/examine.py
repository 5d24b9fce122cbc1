"""Everything that is to be known of one config on one machine."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from gsae_jax.config import Config
from gsae_jax.mesh import axis_sizes, make_mesh
from launch.preflight import meshes, parts, programs, remedies, show, topology
from launch.preflight.model import Model
from launch.preflight.roofline import GIB
from launch.preflight.topology import Machine
from launch.submission import check_hosts


@dataclasses.dataclass(frozen=True)
class Found:
  """What was found.

  Attributes:
    mesh: sizes of the axes that training has.
    rows: of every program; see `parts.measured`.
    totals: by part; see `parts.total`.
    problems: a sentence for each part that does not fit, with what would.
  """

  mesh: dict[str, int]
  rows: list[dict[str, Any]]
  totals: dict[str, dict[str, Any]]
  problems: list[str]


def examine(
  config: Config,
  model: Model,
  machine: Machine,
  *,
  wanted: Collection[str] = parts.PARTS,
  tries: int = 0,
  price: float | None = None,
  say: Callable[[str], None] = print,
) -> Found:
  """Compiles the programs of an experiment, telling of each.

  Args:
    config: the experiment.
    model: its language model.
    machine: the chips.
    wanted: which of `parts.PARTS`.
    tries: other meshes that the train step is compiled for.
    price: dollars of a chip for an hour; None is not to speak of costs.
    say: takes lines.

  Raises:
    UserError: the config cannot be run on these chips, whatever they hold.
  """
  mesh = config.mesh
  sizes = axis_sizes(mesh.data, mesh.model, mesh.sae, machine.chips)
  check_hosts(config.loader.source == 'stream', machine.hosts)
  chips = topology.devices(machine)
  found = Found(sizes, [], {}, [])
  steps = remedies.Steps(model)

  def look(part: parts.Part) -> None:
    say(f'\n{part.name}\n')
    say(show.line(show.HEADS))
    say(show.line(['---'] * len(show.HEADS)))
    rows = []
    for row in parts.measured(part, steps.measure):
      rows.append(row)
      say(show.line(show.cells(row)))
    total = parts.total(part, rows, machine)
    if part.name == 'train' and config.loader.source == 'stream':
      total = parts.streamed(total, found.totals['harvest'])
    found.rows.extend(rows)
    found.totals[part.name] = total
    say('\n' + '\n'.join(show.summary(total, machine, price)))

  if 'harvest' in wanted or config.loader.source == 'stream':
    look(parts.harvest(config, model, machine))
  if 'train' in wanted:
    made = make_mesh(mesh.data, mesh.model, mesh.sae, chips)
    look(parts.train(config, model, machine, made))
    _compare(found, config, model, machine, steps, tries, say)
  if 'evaluate' in wanted:
    look(parts.evaluate(config, model, machine))
  for name in ('harvest', 'evaluate'):
    if not found.totals.get(name, {'fits': True})['fits']:
      would = _smaller(name, found, config, model, machine, say)
      found.problems.append(_problem(found.totals[name], machine, would))
  return found


def work_of(config: Config, model: Model, machine: Machine) -> meshes.Work:
  """What the config trains, for `meshes` to divide."""
  # Products do not depend on the mesh, and one chip divides all sizes.
  mesh = make_mesh(1, 1, devices=topology.devices(machine)[:1])
  groups = programs.groups(config, model.widths(config.sites), mesh)
  products = []
  for group in groups:
    step = programs.step(group, config, machine, mesh)
    members = len(group.members) if group.stacked else 1
    products.append(step.products().times(1 / members))
  return meshes.Work(config, groups, products)


def _compare(
  found: Found, config, model, machine, steps, tries: int, say
) -> None:
  """Ranks the meshes, compiles the best, and says what would fit."""
  work = work_of(config, model, machine)
  ranked = meshes.rank(work, machine)
  sizes = found.mesh['sae'], found.mesh['data'], found.mesh['model']
  total = found.totals['train']
  totals = {sizes: total}
  for estimate in [e for e in ranked if e.sizes != sizes][:tries]:
    totals[estimate.sizes] = steps.total(config, machine, estimate.sizes)
  say('\n' + '\n'.join(show.ranking(ranked, totals, sizes, machine)))

  def with_change(remedy: remedies.Remedy) -> dict[str, Any]:
    changed = steps.total(remedy.config, remedy.machine, remedy.sizes)
    if config.loader.source == 'stream':
      changed = parts.streamed(changed, found.totals['harvest'])
    return changed

  if not total['fits']:
    now = meshes.estimate(work, machine, *sizes)
    beside = 0
    if config.loader.source == 'stream':
      beside = found.totals['harvest']['needs']
    kinds = remedies.of_training(work, machine, now, beside)
    would = remedies.confirmed(kinds, with_change, say)
    found.problems.append(_problem(total, machine, would))


def _problem(total: dict[str, Any], machine: Machine, would: list[str]) -> str:
  needs, usable = total['needs'] / GIB, total['usable'] / GIB
  help_ = f'; what would fit: {"; or ".join(would)}' if would else ''
  return (
    f'{total["part"]} needs {needs:.2f} GiB of the {usable:.2f} that a chip of '
    f'{machine.name} has{help_}'
  )


def _smaller(name: str, found: Found, config, model, machine, say) -> list[str]:
  """What would fit of a language model's passes."""
  make = {'harvest': parts.harvest, 'evaluate': parts.evaluate}[name]
  needs, usable = found.totals[name]['needs'], machine.chip.usable
  kind = lambda program: program.split(maxsplit=1)[0].rstrip(',')
  large = {
    kind(row['program'])
    for row in found.rows
    if row['part'] == name and ('does_not_fit' in row or row['needs'] > usable)
  }

  def with_change(remedy: remedies.Remedy) -> dict[str, Any]:
    part = make(remedy.config, model, remedy.machine)
    again = tuple(p for p in part.programs if kind(p.name) in large)
    part = dataclasses.replace(part, programs=again)
    return parts.total(part, list(parts.measured(part)), remedy.machine)

  kinds = remedies.of_pass(name, needs, config, model, machine)
  return remedies.confirmed(kinds, with_change, say)
