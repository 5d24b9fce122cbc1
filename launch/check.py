"""Checks a config's fields as the programs do: `python -m launch.check`."""

from gsae_jax import config, program

_CONFIG = program.define_config()


def main() -> None:
  config.parse(program.read_config(_CONFIG))


if __name__ == '__main__':
  program.run(main)
