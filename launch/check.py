"""Checks a config's fields as the programs do: `python -m launch.check`."""

from absl import flags

from gsae_jax import config as config_lib
from gsae_jax import program
from gsae_jax.mesh import axis_sizes


def define_flags(values: flags.FlagValues) -> None:
  """Adds the flags of this command."""
  program.define_config(values)
  flags.DEFINE_integer(
    'chips', None, 'How many the mesh must cover.', flag_values=values
  )


def main(given: flags.FlagValues) -> None:
  config = config_lib.parse(program.read_config(given))
  if given.chips is not None:
    mesh = config.mesh
    axis_sizes(mesh.data, mesh.model, mesh.sae, given.chips)


COMMAND = program.Command(define_flags, main)

if __name__ == '__main__':
  COMMAND.run()
