"""`python -m launch.preflight`, as `python -m launch preflight`."""

from gsae_jax import program
from launch.preflight.command import main

if __name__ == '__main__':
  program.run(main)
