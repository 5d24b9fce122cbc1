"""How a pass is divided over devices: by pmap or by a mesh, one interface."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.errors import UserError
from gsae_jax.lm.layouts import Layout
from gsae_jax.lm.weights import LanguageModel
from gsae_jax.sae import SPECS
from gsae_jax.sae.layers import Dictionary

AXIS = 'data'

# Of a device's memory, for parameters of SAEs that are evaluated together.
SHARE = 0.25

# 128 MiB.
_LOGITS = 2**25

# Features from which decoding by tiles is faster.
_LARGE = 4096


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Out:
  """What a pass returns.

  Attributes:
    rows: `[B, ...]` each, to look at.
    sums: over all rows, whole on every device.
    kept: what the next pass wants; stays where it was made.
  """

  # Dictionaries by name; `compile` has the axis or the sharding of each here.
  rows: Any = dataclasses.field(default_factory=dict)
  sums: Any = dataclasses.field(default_factory=dict)
  kept: Any = ()


class Devices:
  """`spread` puts a batch on the devices, `language_model` and `sae` parameters,
  and `compile` turns a pass into a program over all devices.
  """

  def __init__(self, parallel: str, layout: Layout):
    """Takes 'pmap', 'mesh', or 'auto': pmap where devices hold the whole model.

    Raises:
      UserError: pmap is asked for, and they do not.
    """
    whole = layout.kind == 'replicated'
    if parallel == 'auto':
      parallel = 'pmap' if whole else 'mesh'
    if parallel == 'pmap' and not whole:
      raise UserError(
        "eval.parallel: with 'pmap' every device holds the language model, "
        f"which lm.layout, {layout.kind!r}, divides; set it to 'mesh' or 'auto'"
      )
    self.pmapped = parallel == 'pmap'
    self.layout = layout

  @property
  def parts_in_sight(self) -> int:
    """Parts that a program's own rows are divided into, by the compiler."""
    return 1 if self.pmapped else self.layout.parts

  def logits(self, vocabulary: int) -> int:
    """How many are held at a time, at most, of each model that is compared."""
    if self.layout.mesh.devices.flat[0].platform != 'cpu':
      return _LOGITS
    # What goes into a cache, in products that are still large, is faster by 1.2.
    return min(_LOGITS, 256 * vocabulary)

  def decodes_by_tiles(self, module: nn.Module) -> bool:
    """Whether reconstructions of an SAE are made of what is in use alone.

    Where that was measured, and the SAE is large.
    """
    on_cpu = self.layout.mesh.devices.flat[0].platform == 'cpu'
    large = isinstance(module, Dictionary) and module.features >= _LARGE
    return self.pmapped and on_cpu and large

  def language_model(self, lm: LanguageModel) -> Any:
    """Its parameters, as the layout says."""
    if self.pmapped:
      return lm.load(put=self._on_each)
    return lm.load(self.layout.place)

  def sae(self, params: dict[str, np.ndarray]) -> Any:
    """Parameters of one SAE."""
    if self.pmapped:
      return {name: self._on_each(value) for name, value in params.items()}
    return {
      name: jax.device_put(value, self.place_sae(name, value.shape))
      for name, value in params.items()
    }

  def everywhere(self, tree: Any) -> Any:
    """Small arrays, on every device."""
    if self.pmapped:
      return jax.tree.map(self._on_each, tree)
    return jax.device_put(tree, self.layout.everywhere)

  def _on_each(self, value: np.ndarray) -> jax.Array:
    """`[devices, ...]` for pmap; the host makes no copy of it for each."""
    mesh = self.layout.mesh
    return jax.make_array_from_single_device_arrays(
      (mesh.size, *value.shape),
      NamedSharding(mesh, P(('data', 'model'))),
      [jax.device_put(value[None], device) for device in mesh.devices.flat],
    )

  def groups(self, saes: dict[str, tuple]) -> list[dict[str, tuple]]:
    """SAEs in order, so many together as devices have room for."""
    stats = self.layout.mesh.local_devices[0].memory_stats()
    limit = SHARE * stats['bytes_limit'] if stats else np.inf
    groups: list[dict[str, tuple]] = []
    held = 0
    for name, sae in saes.items():
      size = sum(self._bytes(k, v) for k, v in sae[2].items())
      if not groups or held + size > limit:
        groups.append({})
        held = 0
      groups[-1][name] = sae
      held += size
    return groups

  def _bytes(self, name: str, value: np.ndarray) -> int:
    """Of a device that a parameter takes."""
    if self.pmapped:
      return value.nbytes
    part = self.place_sae(name, value.shape).shard_shape(value.shape)
    return int(np.prod(part)) * value.dtype.itemsize

  def place_sae(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Features are divided as the language model's heads are, if they can be."""
    mesh, spec = self.layout.mesh, SPECS.get(name, P())
    divided = [n for n, axis in zip(shape, spec, strict=False) if axis]
    if any(n % mesh.shape['model'] for n in divided):
      spec = P()
    return NamedSharding(mesh, spec)

  def spread(self, value: np.ndarray) -> Any:
    """Rows `[B, ...]`, or `[devices, B / devices, ...]` for pmap."""
    if self.pmapped:
      return value.reshape(self.layout.parts, -1, *value.shape[1:])
    return jax.device_put(value, self.layout.contexts)

  def fetch(self, rows: Any) -> Any:
    """`Out.rows` on the host, `[B, ...]` each."""
    rows = jax.device_get(rows)
    if not self.pmapped:
      return rows
    return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), rows)

  def each(self, kept: Any) -> list[Any]:
    """What every part of a pmapped program, or the whole of another, kept."""
    kept = jax.device_get(kept)
    if not self.pmapped:
      return [kept]
    return [
      jax.tree.map(lambda v, i=i: v[i], kept) for i in range(self.layout.parts)
    ]

  def compile(self, fn: Callable[..., Out]) -> jax.stages.Wrapped:
    """Compiles a pass, whose first argument is the language model's parameters."""
    if self.pmapped:

      def on_each(*args):
        out = fn(*args)
        sums = {k: jax.lax.psum(v, AXIS) for k, v in out.sums.items()}
        return dataclasses.replace(out, sums=sums)

      axes = Out(rows=0, sums=None, kept=0)
      # Of this process; without them, pmap would wait for all processes.
      devices = list(self.layout.mesh.devices.flat)
      return jax.pmap(on_each, axis_name=AXIS, out_axes=axes, devices=devices)
    return jax.jit(
      lambda lm_params, *args: fn(self.layout.gather(lm_params), *args),
      out_shardings=Out(rows=None, sums=self.layout.everywhere, kept=None),
    )
