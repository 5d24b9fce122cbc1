"""The parts of an experiment on a machine: their programs, and what they add up to."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gsae_jax.config import Config
from gsae_jax.lm.weights import DTYPES
from gsae_jax.sae import variant
from launch.preflight import programs as programs_lib
from launch.preflight.evaluation import Evaluation
from launch.preflight.measure import DoesNotFit, Program, measure
from launch.preflight.model import Model
from launch.preflight.topology import Machine

PARTS = ('harvest', 'train', 'evaluate')


@dataclasses.dataclass(frozen=True)
class Part:
  """One of the package's programs.

  Attributes:
    name: one of PARTS.
    programs: that it compiles.
    held: bytes of a chip between two of them.
    turns: passes, steps or batches in all; of evaluation, for a checkpoint.
    tokens: of a turn, on all hosts.
    row_bytes: of storage, that it reads or writes for a token.
  """

  name: str
  programs: tuple[Program, ...]
  held: int
  turns: int
  tokens: int
  row_bytes: int


def harvest(config: Config, model: Model, machine: Machine) -> Part:
  program = programs_lib.forward(config, model, machine)
  tokens = program.tokens * machine.hosts
  # What the last pass gave is on its way to the host.
  held = _bytes(program.args) + _bytes_of_output(program)
  return Part(
    'harvest',
    (program,),
    held,
    math.ceil(config.store.tokens / tokens),
    tokens,
    _row_bytes(config, model, config.sites),
  )


def _bytes_of_output(program: Program) -> int:
  out = jax.eval_shape(
    lambda *a: program.fn(*a, **program.kwargs), *program.args
  )
  size = sum(
    math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(out)
  )
  return size // program.mesh.shape['data']


def train(config: Config, model: Model, machine: Machine, mesh: Mesh) -> Part:
  sites = tuple(dict.fromkeys(m.site for m in config.saes))
  groups = programs_lib.groups(config, model.widths(sites), mesh)
  made = [programs_lib.step(g, config, machine, mesh) for g in groups]
  made = _told_apart(groups, made)
  states = sum(int(p.runs) * _bytes(p.args[0]) for p in made)
  batch = {
    site: p.args[1][0]
    for g, p in zip(groups, made, strict=True)
    for site in g.sites
  }
  stored = config.loader.source == 'store'
  return Part(
    'train',
    tuple(made),
    states + 2 * _bytes(batch),  # The next one is there, too.
    config.train.steps,
    config.train.batch_size,
    _row_bytes(config, model, sites) if stored else 0,
  )


def _told_apart(
  groups: list[programs_lib.Group], made: list[Program]
) -> list[Program]:
  """Steps, with what tells those of one name apart in it."""
  for more in (
    lambda g: f', D={g.module.width}',
    lambda g: f', {variant(dataclasses.asdict(g.members[0].config))}',
  ):
    count = collections.Counter(p.name for p in made)
    made = [
      dataclasses.replace(p, name=f'{p.name}{more(g)}'.rstrip(', '))
      if count[p.name] > 1
      else p
      for g, p in zip(groups, made, strict=True)
    ]
  return made


def evaluate(config: Config, model: Model, machine: Machine) -> Part:
  found = Evaluation(config, model, machine)
  first = found.programs[0]
  return Part(
    'evaluate',
    tuple(found.programs),
    found.held,
    found.batches,
    first.tokens * machine.hosts,
    0,
  )


def _row_bytes(config: Config, model: Model, sites) -> int:
  widths = model.module.config.site_widths()
  size = np.dtype(DTYPES[config.store.dtype]).itemsize
  return size * sum(widths[site] for site in sites)


def _bytes(tree: Any) -> int:
  """Of a device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def measured(
  part: Part, measure: Callable[[Program], dict[str, Any]] = measure
) -> Iterator[dict[str, Any]]:
  """A row for each program, as plain data.

  Args:
    part: whose programs.
    measure: as `measure.measure`; some may have been compiled before.
  """
  for program in part.programs:
    row: dict[str, Any] = {
      'part': part.name,
      'program': program.name,
      'machine': program.machine.name,
      'mesh': dict(program.mesh.shape),
      'runs': program.runs,
    }
    try:
      row |= measure(program)
      held = row['held']
      beside = max(part.held - held['arguments'], 0)
      needs = beside + held['peak'] + held['code']
    except DoesNotFit as error:
      row['does_not_fit'] = error.words
      needs = max(part.held - _bytes(program.args), 0) + error.needs
    yield row | {'needs': needs}


def total(
  part: Part, rows: list[dict[str, Any]], machine: Machine
) -> dict[str, Any]:
  """What the programs of a part add up to.

  Rates are from one after the other to compute, memory and network at the same
  time; so are hours, the other way round.
  """
  needs = max(row['needs'] for row in rows)
  out = {
    'part': part.name,
    'needs': needs,
    'usable': machine.chip.usable,
    'fits': needs <= machine.chip.usable,
    'turns': part.turns,
  }
  if any('does_not_fit' in row for row in rows):
    return out | {'fits': False}
  kinds = rows[0]['seconds']
  spent = {k: sum(r['runs'] * r['seconds'][k] for r in rows) for k in kinds}
  apart = sum(r['runs'] * sum(r['seconds'].values()) for r in rows)
  together = sum(r['runs'] * max(r['seconds'].values()) for r in rows)
  rates = [part.tokens / apart, part.tokens / together]
  return out | {
    'bound': max(spent, key=spent.__getitem__),
    'tokens': part.turns * part.tokens,
    'tokens_per_second': rates,
    'hours': [part.turns * t / 3600 for t in (together, apart)],
    'storage': [part.row_bytes * rate for rate in rates],
  }


def streamed(train: dict[str, Any], forward: dict[str, Any]) -> dict[str, Any]:
  """Training with the language model along, which takes turns with it."""
  needs = train['needs'] + forward['needs']
  out = train | {'needs': needs, 'fits': needs <= train['usable']}
  if 'hours' not in train or 'hours' not in forward:
    return out | {'fits': False}
  rates = [
    1 / (1 / a + 1 / b)
    for a, b in zip(
      train['tokens_per_second'], forward['tokens_per_second'], strict=True
    )
  ]
  hours = [train['tokens'] / rate / 3600 for rate in reversed(rates)]
  slower = min((train, forward), key=lambda t: t['tokens_per_second'])
  bound = slower['bound']
  return out | {'bound': bound, 'tokens_per_second': rates, 'hours': hours}
