"""The door between config files and code: checks, then plain dataclasses.

Defaults live in `experiments/quickstart.py`, which a user's own file may start
from; here every field is required but the optional ones of a member.
"""

import collections
import dataclasses
from typing import Any

import ml_collections

from gsae_jax import checks
from gsae_jax.config_inputs import (
  LMConfig,
  LoaderConfig,
  StoreConfig,
  TextConfig,
)
from gsae_jax.errors import UserError
from gsae_jax.parsing import parse_dataclass, plain
from gsae_jax.sae import ARCHITECTURES, TRAINED, VARIANTS, has
from gsae_jax.sae.gated import ENCODERS
from gsae_jax.sae.layers import PRECISIONS, SPARSITIES

_LOSS_SCALES = ('sum', 'mean', 'mean_over_norm')


@dataclasses.dataclass(frozen=True)
class MemberConfig:
  """One SAE of a run. What is None follows the run.

  `encoder` to `sparsity` are variants that not every architecture has; their
  defaults are the paper's. `baseline` and `baseline_member` say what a
  'rescale_shift' starts from, as `gsae_jax.load` takes them.
  """

  name: str
  architecture: str
  site: str
  features: int
  l1: float
  seed: int | None = None
  learning_rate: float | None = None
  loss_scale: str | None = None
  encoder: str = VARIANTS['encoder']
  freeze_aux_decoder: bool = VARIANTS['freeze_aux_decoder']
  centre_stop_gradient: bool = VARIANTS['centre_stop_gradient']
  sparsity: str = VARIANTS['sparsity']
  baseline: str | None = None
  baseline_member: str | None = None

  def __post_init__(self):
    if self.architecture in set(ARCHITECTURES) - set(TRAINED):
      raise UserError(
        f'config field saes[].architecture: {self.architecture!r} is not '
        f"trained (member {self.name!r}); train 'gated', and make it of what "
        f'gsae_jax.load gives, by to_{self.architecture}()'
      )
    checks.choice('saes[].architecture', self.architecture, TRAINED)
    checks.choice('saes[].encoder', self.encoder, ENCODERS)
    checks.choice('saes[].sparsity', self.sparsity, SPARSITIES)
    if self.loss_scale is not None:
      checks.choice('saes[].loss_scale', self.loss_scale, _LOSS_SCALES)
    self._check_variant()
    checks.at_least('saes[].features', self.features, 1)
    checks.at_least('saes[].l1', self.l1, 0)
    if self.seed is not None:
      checks.seed('saes[].seed', self.seed)
    if self.learning_rate is not None:
      checks.positive('saes[].learning_rate', self.learning_rate)
    if self.name in ('', '.', '..') or set(self.name) & set('/\\ \t\n'):
      raise UserError(
        f'config field saes[].name: {self.name!r} must be a word without '
        'slashes and spaces; it names folders'
      )

  def _check_variant(self):
    for option, usual in VARIANTS.items():
      if getattr(self, option) != usual and not has(self.architecture, option):
        raise UserError(
          f'config field saes[].{option}: {getattr(self, option)!r} is not for '
          f'architecture {self.architecture!r} (member {self.name!r})'
        )
    starts = self.architecture == 'rescale_shift'
    named = self.baseline is not None
    if starts != named or (self.baseline_member is not None and not named):
      raise UserError(
        f'config field saes[].baseline: member {self.name!r} is of architecture '
        f'{self.architecture!r}; '
        + ('say which SAE it starts from' if starts else 'leave it out')
      )
    if starts and self.l1:
      raise UserError(
        f'config field saes[].l1: member {self.name!r} has no sparsity term; '
        'set it to 0'
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
  clip_norm: float | None
  precision: str
  members: str
  sparse: str
  microbatches: int
  checkpoint_every: int
  checkpoints_kept: int | None
  checkpoints_kept_every: int | None
  log_every: int
  histogram_every: int
  writers: tuple[str, ...]

  def __post_init__(self):
    checks.choice(
      'train.normalize', self.normalize, ('mean_squared_norm', None)
    )
    checks.choice('train.loss_scale', self.loss_scale, _LOSS_SCALES)
    checks.choice('train.precision', self.precision, PRECISIONS)
    checks.choice('train.members', self.members, ('auto', 'stacked', 'looped'))
    checks.choice('train.sparse', self.sparse, ('auto', 'always', 'never'))
    for writer in self.writers:
      checks.choice('train.writers', writer, ('tensorboard', 'wandb'))
    for name in (
      'steps', 'batch_size', 'checkpoint_every', 'log_every', 'dead_after',
      'histogram_every', 'microbatches',
    ):  # fmt: skip
      checks.at_least(f'train.{name}', getattr(self, name), 1)
    for name in ('warmup_steps', 'l1_warmup_steps', 'decay_steps'):
      checks.at_least(f'train.{name}', getattr(self, name), 0)
    checks.positive('train.learning_rate', self.learning_rate)
    checks.positive('train.encoder_scale', self.encoder_scale)
    if self.clip_norm is not None:
      checks.positive('train.clip_norm', self.clip_norm)
    if self.sparse == 'always' and self.members == 'stacked':
      raise UserError(
        "config field train.sparse: 'always' is for members that are not stacked; "
        "set train.members to 'looped'"
      )
    if self.batch_size % self.microbatches:
      raise UserError(
        f'config field train.microbatches: {self.microbatches} does not divide '
        f'train.batch_size, {self.batch_size}'
      )
    if self.checkpoints_kept is not None:
      checks.at_least('train.checkpoints_kept', self.checkpoints_kept, 1)
    if self.checkpoints_kept_every is not None:
      checks.at_least(
        'train.checkpoints_kept_every', self.checkpoints_kept_every, 1
      )
      if self.checkpoints_kept is None:
        raise UserError(
          'config field train.checkpoints_kept_every: train.checkpoints_kept is '
          'None, which keeps all; set that too'
        )
    for step in self.resample_steps:
      if not 0 < step < self.steps:
        raise UserError(
          f'config field train.resample_steps: {step} is not between 0 and '
          f'train.steps, {self.steps}; () is never'
        )
    if self.resample_steps and self.resample_rows < self.batch_size:
      raise UserError(
        f'config field train.resample_rows: {self.resample_rows} is less than '
        f'a batch, {self.batch_size}'
      )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  tokens: int
  stride: int
  batch_size: int
  parallel: str
  special_tokens: str
  dashboards: str
  top_contexts: int
  top_logits: int

  def __post_init__(self):
    checks.choice('eval.parallel', self.parallel, ('pmap', 'mesh', 'auto'))
    checks.choice('eval.special_tokens', self.special_tokens, ('text', 'both'))
    checks.choice('eval.dashboards', self.dashboards, ('none', 'last', 'all'))
    for name in (
      'tokens',
      'stride',
      'batch_size',
      'top_contexts',
      'top_logits',
    ):
      checks.at_least(f'eval.{name}', getattr(self, name), 1)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  sae: int
  data: int
  model: int

  def __post_init__(self):
    for name in ('sae', 'data', 'model'):
      if getattr(self, name) != -1:
        checks.at_least(f'mesh.{name}', getattr(self, name), 1)


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
    checks.seed('seed', self.seed)
    lists = {'sites': self.sites, 'saes': tuple(s.name for s in self.saes)}
    for field, values in lists.items():
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
    if self.mesh.sae != 1 and self.train.members == 'looped':
      raise UserError(
        "config field train.members: 'looped' members cannot be spread over "
        f"mesh.sae, {self.mesh.sae}; use 'auto' or 'stacked'"
      )

  def identity(self) -> dict[str, Any]:
    """What a checkpoint depends on beside its store, as plain data.

    Where a run writes and how often, the mesh, what only speed depends on, and
    the evaluation may change between one start of a run and the next.
    """
    train = dataclasses.asdict(self.train)
    for name in (
      'checkpoint_every', 'checkpoints_kept', 'checkpoints_kept_every',
      'log_every', 'writers', 'members', 'sparse', 'microbatches',
    ):  # fmt: skip
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
    UserError: a field is unknown, missing, of a wrong type or out of range.
  """
  if not isinstance(raw, ml_collections.ConfigDict):
    raise UserError(
      '--config: get_config() must return an ml_collections.ConfigDict, not '
      f'{type(raw).__name__}'
    )
  return parse_dataclass(Config, raw.to_dict(), '')
