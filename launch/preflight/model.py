"""The language model of a config: its shapes, without its weights."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from gsae_jax.config_inputs import LMConfig
from gsae_jax.lm import layouts, weights
from gsae_jax.lm.layouts import Layout, make_layout
from gsae_jax.lm.transformer import Transformer
from launch.preflight.topology import Machine, abstract, devices


@dataclasses.dataclass(frozen=True)
class Model:
  """What `LanguageModel` says of a model, of config.json alone.

  Attributes:
    module: the Flax module.
    shapes: of all parameters, by path.
    dtype: of parameters and activations.
  """

  module: Transformer
  shapes: dict[str, tuple[int, ...]]
  dtype: jnp.dtype

  @property
  def bytes(self) -> int:
    return self.dtype.itemsize * sum(map(math.prod, self.shapes.values()))

  def widths(self, sites: Iterable[str]) -> dict[str, int]:
    """D by site.

    Raises:
      UserError: the model has no such site.
    """
    return {site: self.module.config.check_site(site) for site in sites}

  def params(self, make, blocks: int | None = None) -> dict:
    """The tree that `LanguageModel.load` would give.

    Args:
      make: gives a leaf, of its path, shape and dtype.
      blocks: only what the first so many blocks need.
    """
    params: dict[str, Any] = {}
    for path, shape in self.shapes.items():
      if blocks is None or weights.is_below(path, blocks):
        node = params
        *parents, leaf = path.split('/')
        for parent in parents:
          node = node.setdefault(parent, {})
        node[leaf] = make(path, shape, self.dtype)
    return params


def read_model(config: LMConfig) -> Model:
  """The model of a folder, of which config.json is enough, or of the hub.

  Raises:
    UserError: there is none, or it is of no family that is supported.
  """
  folder = weights.find_folder(config.path, config.revision, ('config.json',))
  found = weights.read_architecture(folder)
  dtype = jnp.dtype(weights.DTYPES[config.dtype])
  return Model(found.module, found.shapes, dtype)


def layout_of(kind: str, model: Model, machine: Machine, axis: int) -> Layout:
  """The layout of a model on a host's chips, as the programs choose it.

  Args:
    kind: lm.layout.
    model: the language model.
    machine: the chips of one host.
    axis: mesh.model.
  """
  if kind == 'auto':
    room = layouts.SHARE * machine.chip.usable
    kind = 'fully_sharded' if model.bytes > room else 'replicated'
  return make_layout(
    kind, model.module.config, model.bytes, devices(machine), axis
  )


def place(layout: Layout):
  """Gives the leaves of `Model.params` where a layout says."""
  return lambda path, shape, dtype: abstract(
    shape, dtype, layout.place(path, shape)
  )
