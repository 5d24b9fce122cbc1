"""The mesh: axes 'sae', 'data' (rows) and 'model' (features), always there."""

import math

import jax
from jax.experimental import mesh_utils

from gsae_jax.errors import UserError


def axis_sizes(data: int, model: int, sae: int, devices: int) -> dict[str, int]:
  """Sizes of the axes by name, outermost first.

  Args:
    data: size of the axis that splits rows; -1 for "the rest".
    model: size of the axis that splits features; -1 for "the rest".
    sae: size of the axis that splits the SAEs of a group; -1 for "the rest".
    devices: that they divide.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  sizes = {'sae': sae, 'data': data, 'model': model}
  rest = [name for name, size in sizes.items() if size == -1]
  if len(rest) == 1:
    others = -math.prod(sizes.values())
    sizes[rest[0]] = devices // others if others else 0
  if min(sizes.values()) < 1 or math.prod(sizes.values()) != devices:
    raise UserError(
      f'mesh: sae={sae} x data={data} x model={model} does not cover {devices} '
      'device(s); set one axis to -1'
    )
  return sizes


def make_mesh(
  data: int, model: int, sae: int = 1, devices: list | None = None
) -> jax.sharding.Mesh:
  """A mesh over devices.

  Args:
    data: as of `axis_sizes`.
    model: likewise.
    sae: likewise. It is the outermost: nothing is sent along it while training.
    devices: None is all of all processes.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = axis_sizes(data, model, sae, len(devices))
  # Unlike jax.make_mesh, this may divide an axis of a TPU's network: without it,
  # 16 x 16 chips have no mesh of 4 x 64.
  placed = mesh_utils.create_device_mesh(
    tuple(sizes.values()), devices, allow_split_physical_axes=True
  )
  # The default axis type changed between the releases we run on.
  auto = (jax.sharding.AxisType.Auto,) * 3
  return jax.sharding.Mesh(placed, tuple(sizes), axis_types=auto)
