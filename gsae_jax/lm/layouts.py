"""How a language model lies on the devices that run it.

replicated     every device holds all of it, and takes contexts of its own
tensor         heads, MLP and vocabulary are divided over 'model', and the
               sums over them go between devices; contexts over 'data'
fully_sharded  what is left of each matrix is divided over 'data' as well, and
               put together again in front of the layer that uses it
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.errors import UserError
from gsae_jax.lm.architecture import TransformerConfig

LAYOUTS = ('auto', 'replicated', 'tensor', 'fully_sharded')

# Of a device's memory, for the parameters of a model that each device holds; the
# rest is for what it computes.
SHARE = 0.6

# The axis of each matrix that is divided over 'model'; what it stands for.
_DIVIDED = {
  'W_E': (0, 'vocabulary'),
  'W_U': (1, 'vocabulary'),
  'b_U': (0, 'vocabulary'),
  'W_Q': (1, 'heads'),
  'b_Q': (0, 'heads'),
  'W_K': (1, 'kv_heads'),
  'b_K': (0, 'kv_heads'),
  'W_V': (1, 'kv_heads'),
  'b_V': (0, 'kv_heads'),
  'W_O': (0, 'heads'),
  'W_in': (1, 'mlp_width'),
  'b_in': (0, 'mlp_width'),
  'W_gate': (1, 'mlp_width'),
  'b_gate': (0, 'mlp_width'),
  'W_out': (0, 'mlp_width'),
}


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where parameters and contexts lie.

  Attributes:
    kind: one of LAYOUTS but 'auto'.
    mesh: of axes 'data' and 'model'.
    config: the model's.
  """

  kind: str
  mesh: Mesh
  config: TransformerConfig

  @property
  def parts(self) -> int:
    """How many parts contexts are divided into."""
    return self.mesh.shape['data']

  @property
  def contexts(self) -> NamedSharding:
    """Where `[B, L]` token ids, or anything else of contexts, lie."""
    return NamedSharding(self.mesh, P('data'))

  @property
  def everywhere(self) -> NamedSharding:
    """Where what every device holds lies."""
    return NamedSharding(self.mesh, P())

  def place(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where a parameter lies."""
    name = path.split('/')[-1]
    axes = self._model_axes(name, shape)
    if self.kind == 'fully_sharded' and name.startswith('W_'):
      size = self.mesh.shape['data']
      free = [
        (n, i) for i, n in enumerate(shape) if axes[i] is None and n % size == 0
      ]
      if free:
        axes[max(free)[1]] = 'data'
    return NamedSharding(self.mesh, P(*axes))

  def gather(self, params: dict[str, Any]) -> dict[str, Any]:
    """In a program: parameters as the layers use them.

    Said of all at its beginning; XLA puts each together next to its layer, while
    the layer before it runs.
    """
    if self.kind != 'fully_sharded':
      return params

    def one(path, value):
      spec = P(*self._model_axes(path[-1].key, value.shape))
      return jax.lax.with_sharding_constraint(
        value, NamedSharding(self.mesh, spec)
      )

    return jax.tree_util.tree_map_with_path(one, params)

  def _model_axes(self, name: str, shape: tuple[int, ...]) -> list[str | None]:
    axes: list[str | None] = [None] * len(shape)
    size = self.mesh.shape['model']
    # Whole heads go to a device. What cannot be divided is everywhere.
    if size > 1 and name in _DIVIDED:
      axis, unit = _DIVIDED[name]
      if getattr(self.config, unit) % size == 0:
        axes[axis] = 'model'
    return axes


def make_layout(
  kind: str,
  config: TransformerConfig,
  size: int,
  devices: list[jax.Device],
  model: int,
) -> Layout:
  """The layout of a model on some devices.

  Args:
    kind: one of LAYOUTS. 'auto' is 'replicated' for a model that leaves a device
      room to compute, and else 'fully_sharded'.
    config: the model's.
    size: of its parameters, in bytes.
    devices: of this process.
    model: size of the axis that heads are divided over, as far as it divides the
      devices; -1 is all of them. 'replicated' has none.

  Raises:
    UserError: nothing is left of `model` for 'tensor' to divide over.
  """
  # The SAEs' axis may go over many processes, each of which has a model.
  model = len(devices) if model == -1 else math.gcd(model, len(devices))
  if kind == 'auto':
    kind = 'replicated'
    stats = devices[0].memory_stats()
    if stats and size > SHARE * stats['bytes_limit']:
      kind = 'fully_sharded'
  if kind == 'replicated':
    model = 1
  if kind == 'tensor' and model == 1:
    raise UserError(
      "lm.layout: 'tensor' divides the language model over mesh.model, of which "
      f'the {len(devices)} device(s) of a process leave 1; set that, or use '
      "'fully_sharded'"
    )
  mesh = Mesh(np.array(devices).reshape(-1, model), ('data', 'model'))
  return Layout(kind, mesh, config)
