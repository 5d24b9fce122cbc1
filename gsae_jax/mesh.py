"""The mesh: axes 'data' (rows) and 'model' (features), always there."""

import jax

from gsae_jax.errors import UserError


def make_mesh(data: int, model: int) -> jax.sharding.Mesh:
  """A mesh over all devices of all processes.

  Args:
    data: size of the axis that splits rows; -1 for "the rest".
    model: size of the axis that splits features; -1 for "the rest".

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = jax.device_count()
  sizes = [data, model]
  if sizes.count(-1) == 1:
    rest = sizes[0] * sizes[1] * -1
    sizes[sizes.index(-1)] = devices // rest if rest else 0
  if min(sizes) < 1 or sizes[0] * sizes[1] != devices:
    raise UserError(
      f'mesh: data={data} x model={model} does not cover {devices} device(s); '
      'set one axis to -1'
    )
  # The default axis type changed between the releases we run on.
  auto = (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh(tuple(sizes), ('data', 'model'), axis_types=auto)
