"""Checks a config's fields as the programs do: `python -m launch.check`."""

from absl import flags

from gsae_jax import config as config_lib
from gsae_jax import program
from gsae_jax.mesh import axis_sizes

_CONFIG = program.define_config()
_CHIPS = flags.DEFINE_integer('chips', None, 'That the mesh is to cover.')


def main() -> None:
  config = config_lib.parse(program.read_config(_CONFIG))
  if _CHIPS.value is not None:
    mesh = config.mesh
    axis_sizes(mesh.data, mesh.model, mesh.sae, _CHIPS.value)


if __name__ == '__main__':
  program.run(main)
