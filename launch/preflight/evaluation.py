"""The evaluator's passes, of shapes that lie nowhere."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.config import Config
from gsae_jax.errors import UserError
from gsae_jax.evaluation import devices as devices_lib
from gsae_jax.evaluation import passes
from gsae_jax.evaluation.top import Top
from gsae_jax.sae import make_module
from launch.preflight.measure import Program
from launch.preflight.model import Model, layout_of
from launch.preflight.programs import check_length
from launch.preflight.topology import Machine, abstract


class Evaluation:
  """The programs of a batch of contexts on one host.

  Attributes:
    programs: of sites of one kind, that in the lowest layer stands for all:
      most of the model lies behind it.
    held: bytes of a chip between programs.
  """

  def __init__(self, config: Config, model: Model, machine: Machine):
    check_length(config, model)
    self._config, self._model, self._machine = config, model, machine.host
    layout = layout_of(config.lm.layout, model, machine.host, config.mesh.model)
    settings = config.eval
    if settings.batch_size % layout.parts:
      raise UserError(
        f'eval.batch_size: {settings.batch_size} is not divisible by '
        f'{layout.parts}, over which contexts are divided'
      )
    self._layout = layout
    self._placed = devices_lib.Devices(settings.parallel, layout)
    self._shape = settings.batch_size, config.text.context_length
    self._sites = tuple(dict.fromkeys(m.site for m in config.saes))
    for site in self._sites:
      model.module.config.check_site(site)
    per_host = settings.tokens / math.prod(self._shape) / machine.hosts
    self.batches = max(1, math.ceil(per_host))
    # Special tokens counted both ways take two runs of all but the clean pass.
    self._ways = 2 if settings.special_tokens == 'both' else 1
    self._saes = self._by_kind()
    self.programs = [
      self._clean(), self._mean(), *self._ablated(), *self._spliced(),
      self._comparison(), *self._effects(),
    ]  # fmt: skip
    self.held = self._bytes()

  def _by_kind(self):
    """Members of each shape and kind of site, the lowest layer first."""
    layer = lambda m: int(m.site.rpartition('.')[2])
    found: dict[Any, list] = {}
    for member in sorted(self._config.saes, key=layer):
      width = self._model.module.config.site_widths()[member.site]
      sae = make_module(dataclasses.asdict(member) | {'width': width})
      kind = member.site.partition('.')[0]
      found.setdefault((sae, kind), []).append(member)
    return {key: tuple(members) for key, members in found.items()}

  def _rows(self, shape, dtype) -> jax.ShapeDtypeStruct:
    """What `Devices.spread` gives."""
    if not self._placed.pmapped:
      return abstract(shape, dtype, self._layout.contexts)
    parts = self._layout.parts
    return self._on_each((shape[0] // parts, *shape[1:]), dtype)

  def _on_each(self, shape, dtype) -> jax.ShapeDtypeStruct:
    mesh = self._layout.mesh
    spread = NamedSharding(mesh, P(('data', 'model')))
    return abstract((mesh.size, *shape), dtype, spread)

  def _everywhere(self, shape, dtype) -> jax.ShapeDtypeStruct:
    if self._placed.pmapped:
      return self._on_each(shape, dtype)
    return abstract(shape, dtype, self._layout.everywhere)

  @functools.cached_property
  def _params(self) -> dict:
    def make(path, shape, dtype):
      if self._placed.pmapped:
        return self._on_each(shape, dtype)
      return abstract(shape, dtype, self._layout.place(path, shape))

    return self._model.params(make)

  @functools.lru_cache(None)  # noqa: B019 -- lives as long as the command.
  def _sae_params(self, sae) -> dict:
    shapes = jax.eval_shape(
      sae.init, jax.random.key(0), jnp.zeros((1, sae.width))
    )['params']
    if self._placed.pmapped:
      return {k: self._on_each(s.shape, s.dtype) for k, s in shapes.items()}
    return {
      k: abstract(s.shape, s.dtype, self._placed.place_sae(k, s.shape))
      for k, s in shapes.items()
    }

  @property
  def _together(self) -> int:
    """SAEs whose parameters are on the devices at the same time."""
    sizes = [
      _bytes(self._sae_params(sae))
      for (sae, _), members in self._saes.items()
      for _ in members
    ]
    room = devices_lib.SHARE * self._machine.chip.usable
    held = np.cumsum(sizes)
    return max(1, int(np.sum(held <= room)))

  def _program(self, name, fn, args, *, runs=1.0, params=None) -> Program:
    return Program(
      part='evaluate',
      name=name,
      machine=self._machine,
      mesh=self._layout.mesh,
      tokens=math.prod(self._shape),
      runs=runs,
      fn=self._placed.compile(functools.partial(fn, self._model.module)),
      args=(self._params if params is None else params, *args),
    )

  @property
  def _ids(self):
    return self._rows(self._shape, jnp.int32)

  @property
  def _mask(self):
    return self._rows(self._shape, jnp.bool_)

  @property
  def _hidden(self):
    width = self._model.module.config.width
    return self._rows((*self._shape, width), self._model.dtype)

  def _taken(self, site: str) -> dict:
    c = self._model.module.config
    widths = {site: c.site_widths()[site]} | dict.fromkeys(c.cut(site), c.width)
    return {
      k: self._rows((*self._shape, width), self._model.dtype)
      for k, width in widths.items()
    }

  def _turns(self) -> int:
    """Groups of SAEs: each has a clean pass and a comparison of its own."""
    return math.ceil(len(self._config.saes) / self._together)

  def _clean(self) -> Program:
    fn = lambda module, *a: passes.clean_pass(module, self._sites, *a)
    return self._program('clean', fn, (self._ids,), runs=self._turns())

  def _mean(self) -> Program:
    fn = lambda module, *a: passes.mean_pass(module, self._sites, *a)
    args = self._ids, self._mask
    return self._program('mean', fn, args, runs=self._ways)

  def _ablated(self) -> list[Program]:
    kinds: dict[str, list[str]] = {}
    for members in self._saes.values():
      for m in members:
        sites = kinds.setdefault(m.site.partition('.')[0], [])
        sites += [] if m.site in sites else [m.site]
    programs = []
    for sites in kinds.values():
      site = min(sites, key=lambda s: int(s.rpartition('.')[2]))
      width = self._model.module.config.site_widths()[site]
      mean_D = self._everywhere((width,), jnp.float32)
      args = self._ids, self._mask, self._taken(site), mean_D
      programs.append(
        self._program(
          f'ablated, {site}',
          lambda module, *a, s=site: passes.ablated_pass(module, s, *a),
          args,
          runs=self._ways * len(sites),
        )
      )
    return programs

  def _spliced(self) -> list[Program]:
    programs = []
    for (sae, _), members in self._saes.items():
      first = members[0]
      tiles = self._placed.decodes_by_tiles(sae)
      fn = lambda module, *a, sae=sae, site=first.site, tiles=tiles: (
        passes.spliced_pass(module, sae, site, tiles, *a)
      )
      args = (
        self._ids, self._mask, self._taken(first.site), self._sae_params(sae),
        self._top(sae.features),
      )  # fmt: skip
      name = f'spliced, {first.architecture} {first.features:,}, {first.site}'
      programs.append(
        self._program(name, fn, args, runs=self._ways * len(members))
      )
    return programs

  def _top(self, features: int):
    if self._config.eval.dashboards == 'none':
      return None
    shape = features, self._config.eval.top_contexts
    top = Top._make(
      self._everywhere(shape, t) for t in (jnp.float32, *[jnp.int32] * 2)
    )
    return top, self._rows(self._shape[:1], jnp.int32)

  @property
  def _others(self) -> int:
    """Hidden states that are compared with the clean ones."""
    return 2 * len(self._sites) + self._together

  def _comparison(self) -> Program:
    parts = self._placed.parts_in_sight
    most = self._placed.logits(self._model.module.config.vocabulary)
    fn = lambda module, *a: passes.comparison(module, parts, most, *a)
    args = (
      self._ids, self._mask, self._hidden, (self._hidden,) * self._others,
    )  # fmt: skip
    runs = self._ways * self._turns()
    return self._program(f'comparison of {self._others}', fn, args, runs=runs)

  def _effects(self) -> list[Program]:
    if self._config.eval.dashboards == 'none':
      return []
    vocabulary = self._model.module.config.vocabulary
    k = min(self._config.eval.top_logits, vocabulary)
    rows = max(1, self._placed.logits(vocabulary) // vocabulary)
    programs = []
    for (sae, _), members in self._saes.items():
      parts = self._layout.parts
      size = parts * min(-(-sae.features // parts), rows)
      site = members[0].site
      d_ND = self._rows((size, sae.width), jnp.float32)
      blocks = math.ceil(sae.features / size)
      programs.append(
        self._program(
          f'effects, {members[0].architecture} {sae.features:,}, {site}',
          lambda module, *a, s=site: passes.effects_pass(module, s, k, *a),
          (d_ND,),
          runs=len(members) * blocks / self.batches,
        )
      )
    return programs

  def _bytes(self) -> int:
    saes = [
      _bytes((self._sae_params(sae), self._top(sae.features)))
      for (sae, _), members in self._saes.items()
      for _ in members
    ][: self._together]
    taken = {k: v for s in self._sites for k, v in self._taken(s).items()}
    hidden = (self._hidden,) * (1 + self._others)
    return sum(saes) + _bytes((self._params, taken, hidden))


def _bytes(tree: Any) -> int:
  """Of a device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )
