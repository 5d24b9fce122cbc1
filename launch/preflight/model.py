"""The language model of a config: its shapes, without its weights."""

import dataclasses
import math
import os
from collections.abc import Iterable

import huggingface_hub
import jax.numpy as jnp

from gsae_jax.config_inputs import LMConfig
from gsae_jax.errors import UserError
from gsae_jax.lm import layouts, weights
from gsae_jax.lm.families import FAMILIES
from gsae_jax.lm.layouts import Layout, make_layout
from gsae_jax.lm.tokenizer import read_json
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
    params = {}
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
  where = _config_json(config)
  raw = read_json(where)
  family = FAMILIES.get(raw.get('model_type'))
  if family is None:
    raise UserError(
      f'lm.path: {where} has model_type {raw.get("model_type")!r}; supported '
      f'are {", ".join(sorted(FAMILIES))}'
    )
  try:
    module = Transformer(family.config(raw))
    shapes = weights.parameter_shapes(module)
  except UserError:
    raise
  except (
    KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError
  ) as e:  # fmt: skip
    reason = f'no {e}' if isinstance(e, KeyError) else str(e).splitlines()[0]
    raise UserError(f'lm.path: {where}: {reason}') from e
  return Model(module, shapes, jnp.dtype(weights.DTYPES[config.dtype]))


def _config_json(config: LMConfig) -> str:
  path = config.path
  there = path == 'embedded' or os.path.isdir(os.path.expanduser(path))
  if there or path.count('/') > 1 or path.startswith(('.', '/', '~')):
    return os.path.join(weights._folder(path, None), 'config.json')
  try:
    return huggingface_hub.hf_hub_download(
      path, 'config.json', revision=config.revision
    )
  except Exception as e:  # A dozen network and hub errors, all the same here.
    raise UserError(
      f'lm.path: {path!r} is neither a folder nor could its config.json '
      f'be downloaded ({type(e).__name__}); put that file alone into a folder '
      'and give the folder'
    ) from e


def layout_of(kind: str, model: Model, machine: Machine, axis: int) -> Layout:
  """The layout of a model on a host's chips, as the programs choose it.

  Args:
    kind: lm.layout.
    model: the language model.
    machine: the chips of one host.
    axis: mesh.model.
  """
  if kind == 'auto':
    room = layouts._SHARE * machine.chip.usable
    kind = 'fully_sharded' if model.bytes > room else 'replicated'
  return make_layout(
    kind, model.module.config, model.bytes, devices(machine), axis
  )


def place(layout: Layout):
  """Gives the leaves of `Model.params` where a layout says."""
  return lambda path, shape, dtype: abstract(
    shape, dtype, layout.place(path, shape)
  )
