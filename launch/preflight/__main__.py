"""`python -m launch.preflight`, as `python -m launch preflight`."""

from launch.preflight.command import COMMAND

if __name__ == '__main__':
  COMMAND.run()
