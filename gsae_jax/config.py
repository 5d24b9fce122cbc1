"""The door between config files and code: checks, then plain dataclasses.

Defaults live in `experiments/quickstart.py`, which a user's own file may start
from; here every field is required but the optional ones of a member.
"""

import collections
import collections.abc
import dataclasses
import difflib
import json
import math
import types
import typing
from typing import Any

import ml_collections

from gsae_jax.errors import UserError
from gsae_jax.sae import ARCHITECTURES


def _choice(field: str, value: Any, allowed: tuple) -> None:
  if value not in allowed:
    options = ', '.join(map(repr, allowed))
    raise UserError(f'config field {field}: {value!r} is not one of {options}')


def _positive(field: str, value: float) -> None:
  _at_least(field, value, 0)
  if not value:
    raise UserError(f'config field {field} must be more than 0')


def _at_least(field: str, value: float, least: float) -> None:
  if not math.isfinite(value):
    raise UserError(f'config field {field}: {value!r} is not a number')
  if value < least:
    raise UserError(
      f'config field {field}: {value!r} is too small; the least is {least}'
    )


@dataclasses.dataclass(frozen=True)
class LMConfig:
  path: str
  revision: str | None
  dtype: str

  def __post_init__(self):
    _choice('lm.dtype', self.dtype, ('float32', 'bfloat16'))


@dataclasses.dataclass(frozen=True)
class TextConfig:
  path: str
  separator: str | None
  context_length: int
  packing: str
  prepend_bos: bool
  special_tokens: str
  held_out: float

  def __post_init__(self):
    _choice('text.packing', self.packing, ('stream', 'documents'))
    _choice('text.special_tokens', self.special_tokens, ('drop', 'keep'))
    _at_least('text.context_length', self.context_length, 2)
    if not 0 < self.held_out < 1:
      raise UserError(
        f'config field text.held_out: {self.held_out!r} is not between 0 and 1'
      )


@dataclasses.dataclass(frozen=True)
class StoreConfig:
  tokens: int
  shard_rows: int
  chunk_rows: int
  dtype: str
  batch_contexts: int

  def __post_init__(self):
    _choice('store.dtype', self.dtype, ('float32', 'bfloat16'))
    for name in ('tokens', 'shard_rows', 'chunk_rows', 'batch_contexts'):
      _at_least(f'store.{name}', getattr(self, name), 1)
    if self.shard_rows % self.chunk_rows:
      raise UserError(
        f'config field store.shard_rows: {self.shard_rows} is not a multiple '
        f'of store.chunk_rows, {self.chunk_rows}'
      )


@dataclasses.dataclass(frozen=True)
class MemberConfig:
  """One SAE of a run. What is None follows the run."""

  name: str
  architecture: str
  site: str
  features: int
  l1: float
  seed: int | None = None
  learning_rate: float | None = None

  def __post_init__(self):
    _choice('saes[].architecture', self.architecture, tuple(ARCHITECTURES))
    _at_least('saes[].features', self.features, 1)
    _at_least('saes[].l1', self.l1, 0)
    if self.seed is not None:
      _at_least('saes[].seed', self.seed, 0)
    if self.learning_rate is not None:
      _positive('saes[].learning_rate', self.learning_rate)
    if self.name in ('', '.', '..') or set(self.name) & set('/\\ \t\n'):
      raise UserError(
        f'config field saes[].name: {self.name!r} must be a word without '
        'slashes and spaces; it names folders'
      )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  steps: int
  batch_size: int
  learning_rate: float
  warmup_steps: int
  l1_warmup_steps: int
  decay_steps: int
  resample_steps: tuple[int, ...]
  resample_rows: int
  dead_after: int
  encoder_scale: float
  normalize: str | None
  loss_scale: str
  checkpoint_every: int
  checkpoints_kept: int | None
  log_every: int
  writers: tuple[str, ...]

  def __post_init__(self):
    _choice('train.normalize', self.normalize, ('mean_squared_norm', None))
    _choice('train.loss_scale', self.loss_scale, ('sum', 'mean'))
    for writer in self.writers:
      _choice('train.writers', writer, ('tensorboard', 'wandb'))
    for name in (
      'steps', 'batch_size', 'checkpoint_every', 'log_every', 'dead_after'
    ):  # fmt: skip
      _at_least(f'train.{name}', getattr(self, name), 1)
    for name in ('warmup_steps', 'l1_warmup_steps', 'decay_steps'):
      _at_least(f'train.{name}', getattr(self, name), 0)
    _positive('train.learning_rate', self.learning_rate)
    _positive('train.encoder_scale', self.encoder_scale)
    if self.checkpoints_kept is not None:
      _at_least('train.checkpoints_kept', self.checkpoints_kept, 1)
    for step in self.resample_steps:
      if not 0 < step < self.steps:
        raise UserError(
          f'config field train.resample_steps: {step} is not between 0 and '
          f'train.steps, {self.steps}'
        )
    if self.resample_steps and self.resample_rows < self.batch_size:
      raise UserError(
        f'config field train.resample_rows: {self.resample_rows} is less than '
        f'a batch, {self.batch_size}'
      )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  tokens: int
  batch_size: int
  parallel: str

  def __post_init__(self):
    _choice('eval.parallel', self.parallel, ('pmap', 'mesh'))
    _at_least('eval.tokens', self.tokens, 1)
    _at_least('eval.batch_size', self.batch_size, 1)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  data: int
  model: int


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole experiment: the fields that every experiment file has."""

  seed: int
  lm: LMConfig
  text: TextConfig
  sites: tuple[str, ...]
  store: StoreConfig
  saes: tuple[MemberConfig, ...]
  train: TrainConfig
  eval: EvalConfig
  mesh: MeshConfig

  def __post_init__(self):
    _at_least('seed', self.seed, 0)
    for field, values in (
      ('sites', self.sites),
      ('saes', tuple(s.name for s in self.saes)),
    ):
      if not values:
        raise UserError(f'config field {field} is empty; name at least one')
      twice = [v for v, n in collections.Counter(values).items() if n > 1]
      if twice:
        raise UserError(f'config field {field} names {twice[0]!r} twice')
    for sae in self.saes:
      if sae.site not in self.sites:
        raise UserError(
          f'config field saes: member {sae.name!r} is of site {sae.site!r}, '
          f'and sites has only {", ".join(self.sites)}'
        )

  def identity(self) -> dict[str, Any]:
    """What a checkpoint depends on beside its store, as plain data.

    Where a run writes and how often, the mesh and the evaluation may change
    between one start of a run and the next.
    """
    train = dataclasses.asdict(self.train)
    for name in (
      'checkpoint_every',
      'checkpoints_kept',
      'log_every',
      'writers',
    ):
      del train[name]
    saes = {s.name: dataclasses.asdict(s) for s in self.saes}
    return plain({'seed': self.seed, 'saes': saes, 'train': train})


def plain(tree: Any) -> Any:
  """The tree as JSON gives it back: tuples become lists."""
  return json.loads(json.dumps(tree))


def parse(raw: ml_collections.ConfigDict) -> Config:
  """Checks names and types; returns the config as dataclasses.

  Raises:
    UserError: a field is unknown, missing, of the wrong type or out of range.
  """
  if not isinstance(raw, ml_collections.ConfigDict):
    raise UserError(
      '--config: get_config() must return an ml_collections.ConfigDict, not '
      f'{type(raw).__name__}'
    )
  return _parse_dataclass(Config, raw.to_dict(), '')


def _parse_dataclass(cls, raw, prefix: str):
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
    return _parse_dataclass(hint, value, f'{name}.')
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
  if value in ('None', 'none') and type(None) in kinds:
    return None  # How a command line says it.
  if float in kinds and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, kinds) or (
    isinstance(value, bool) and bool not in kinds
  ):
    names = ' or '.join(
      'None' if k is type(None) else k.__name__ for k in kinds
    )
    raise UserError(f'config field {name} must be {names}, not {value!r}')
  return value
