"""What a field of a config may be; each raises a UserError that names it."""

import difflib
import math
from collections.abc import Collection
from typing import Any

from gsae_jax.errors import UserError

# Shapes, and what tokens are counted by.
_FIXED = {'architecture', 'site', 'features', 'encoder', 'batch_size'}


def is_fixed(field: str) -> bool:
  """Whether a field, by its dotted name, cannot change within a run."""
  first, _, rest = field.partition('.')
  return first in ('saes', 'train') and rest.rpartition('.')[2] in _FIXED


def known_field(field: str, names: Collection[str]) -> None:
  """Something that may change has this dotted name."""
  if field not in names:
    near = difflib.get_close_matches(field, sorted(names), 1)
    hint = f'; did you mean {near[0]!r}?' if near else ''
    raise UserError(f'--allow-config-change: there is no field {field!r}{hint}')


def choice(field: str, value: Any, allowed: tuple) -> None:
  """It is one of `allowed`."""
  if value not in allowed:
    options = ', '.join(map(repr, allowed))
    raise UserError(f'config field {field}: {value!r} is not one of {options}')


def positive(field: str, value: float) -> None:
  at_least(field, value, 0)
  if not value:
    raise UserError(f'config field {field} must be more than 0')


def at_least(field: str, value: float, least: float) -> None:
  # Integers are finite, also those that no float can hold.
  if isinstance(value, float) and not math.isfinite(value):
    raise UserError(f'config field {field}: {value!r} is not a number')
  if value < least:
    raise UserError(
      f'config field {field}: {value!r} is too small; the least is {least}'
    )


def seed(field: str, value: int) -> None:
  at_least(field, value, 0)
  if value >= 2**32:  # JAX would leave out the bits above.
    raise UserError(f'config field {field}: {value} is not below 2**32')


def multiple(field: str, value: int, of: str, unit: int) -> None:
  if value % unit:
    raise UserError(
      f'config field {field}: {value} is not a multiple of {of}, {unit}'
    )
