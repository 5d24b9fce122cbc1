"""Mistakes that a user can mend: one line, exit code 1, no traceback."""


class UserError(ValueError):
  """Says which field, file or value is at fault, and what to do about it."""
