"""What ends a command in an orderly way: one line, or none, and an exit code."""

FAILED = 1
PREEMPTED = 42


class UserError(ValueError):
  """Says which field, file or value is at fault, and what to do about it."""

  def __str__(self) -> str:
    # One line: names and values that it quotes may have line breaks in them.
    return ' '.join(super().__str__().splitlines())


class Preempted(Exception):
  """The machine is being taken away; the same command will go on."""
