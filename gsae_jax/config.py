"""The door between config files and code: checks, then plain dataclasses.

Defaults live in `experiments/quickstart.py`, which a user's own file may start
from; here every field is required but the optional ones of a member.
"""

import collections
import dataclasses
import itertools
import math
from typing import Any

import ml_collections

from gsae_jax.errors import UserError
from gsae_jax.parsing import parse_dataclass, plain
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


def _multiple(field: str, value: int, of: str, unit: int) -> None:
  if value % unit:
    raise UserError(
      f'config field {field}: {value} is not a multiple of {of}, {unit}'
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
  buffer_rows: int
  dtype: str
  centre: bool
  batch_contexts: int

  def __post_init__(self):
    _choice('store.dtype', self.dtype, ('float32', 'bfloat16'))
    sizes = ('tokens', 'chunk_rows', 'shard_rows', 'buffer_rows')
    for name in (*sizes, 'batch_contexts'):
      _at_least(f'store.{name}', getattr(self, name), 1)
    for part, whole in itertools.pairwise(sizes[1:]):
      _multiple(
        f'store.{whole}',
        getattr(self, whole),
        f'store.{part}',
        getattr(self, part),
      )
    if self.centre and self.dtype == 'float32':
      raise UserError(
        'config field store.centre: it saves bits of bfloat16, and store.dtype '
        'is float32; set one of the two'
      )


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
  source: str
  unit: str
  shuffle_rows: int

  def __post_init__(self):
    _choice('loader.source', self.source, ('store', 'memory', 'stream'))
    _choice('loader.unit', self.unit, ('chunk', 'shard'))
    _at_least('loader.shuffle_rows', self.shuffle_rows, 1)


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
  loader: LoaderConfig
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
    loader = dataclasses.asdict(self.loader)
    if self.loader.source == 'memory':  # The same batches as from the store.
      loader['source'] = 'store'
    if self.loader.source == 'stream':
      del loader['unit']
    return plain(
      {'seed': self.seed, 'saes': saes, 'train': train, 'loader': loader}
    )


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
  return parse_dataclass(Config, raw.to_dict(), '')
