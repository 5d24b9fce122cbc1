"""A piece of Python as a command, for a process that other commands use too."""

from gsae_jax import program

COMMAND = program.Command(
  lambda values: None,
  lambda given, argument, code: exec(code, {}),
  ('argument', 'code'),
)
