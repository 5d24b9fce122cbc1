"""From the plain data of a config file to dataclasses."""

import collections.abc
import dataclasses
import difflib
import json
import types
import typing
from typing import Any

from gsae_jax.errors import UserError


def parse_dataclass(cls, raw, prefix: str):
  """An instance of a dataclass, its fields checked by name and by type.

  Args:
    cls: the dataclass.
    raw: a mapping.
    prefix: of the fields' names in errors, with a dot at its end.

  Raises:
    UserError: a field is unknown, missing or of the wrong type.
  """
  if not isinstance(raw, collections.abc.Mapping):
    raise UserError(
      f'config field {prefix.rstrip(".")} must be a group of fields, not {raw!r}'
    )
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for name in raw:
    if name not in fields:
      near = difflib.get_close_matches(name, fields, 1)
      hint = f'; did you mean {near[0]!r}?' if near else ''
      raise UserError(f'config field {prefix}{name} is unknown{hint}')
  hints = typing.get_type_hints(cls)
  values = {}
  for name, field in fields.items():
    if name in raw:
      values[name] = _parse_value(hints[name], raw[name], f'{prefix}{name}')
    elif field.default is dataclasses.MISSING:
      raise UserError(
        f'config field {prefix}{name} is missing; experiments/quickstart.py '
        'has every field'
      )
  return cls(**values)


def _parse_value(hint, value, name: str):
  if dataclasses.is_dataclass(hint):
    return parse_dataclass(hint, value, f'{name}.')
  if typing.get_origin(hint) is tuple:
    if not isinstance(value, tuple | list):
      raise UserError(f'config field {name} must be a tuple, not {value!r}')
    (item, _) = typing.get_args(hint)
    return tuple(
      _parse_value(item, v, f'{name}[{i}]') for i, v in enumerate(value)
    )
  kinds = (hint,)
  if isinstance(hint, types.UnionType):
    kinds = typing.get_args(hint)
  if (
    isinstance(value, str) and value in ('None', 'none') and type(None) in kinds
  ):
    return None  # How a command line says it.
  if float in kinds and isinstance(value, int) and not isinstance(value, bool):
    try:
      return float(value)
    except OverflowError as e:
      raise UserError(f'config field {name}: {value!r} is too large') from e
  if not isinstance(value, kinds) or (
    isinstance(value, bool) and bool not in kinds
  ):
    names = ' or '.join(
      'None' if k is type(None) else k.__name__ for k in kinds
    )
    raise UserError(f'config field {name} must be {names}, not {value!r}')
  return value


def plain(tree: Any) -> Any:
  """The tree as JSON gives it back: tuples become lists."""
  return json.loads(json.dumps(tree))
