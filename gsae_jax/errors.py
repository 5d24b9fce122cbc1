"""What ends a command in an orderly way: one line, or none, and an exit code."""

FAILED = 1
PREEMPTED = 42


class UserError(ValueError):
  """Says which field, file or value is at fault, and what to do about it."""


class Preempted(Exception):
  """The machine is being taken away; the same command will go on."""
