"""The groups of a config that say where rows come from, each checked alone."""

import dataclasses
import itertools

from gsae_jax import checks
from gsae_jax.errors import UserError
from gsae_jax.lm.layouts import LAYOUTS


@dataclasses.dataclass(frozen=True)
class LMConfig:
  path: str
  revision: str | None
  dtype: str
  layout: str

  def __post_init__(self):
    checks.choice('lm.dtype', self.dtype, ('float32', 'bfloat16'))
    checks.choice('lm.layout', self.layout, LAYOUTS)


@dataclasses.dataclass(frozen=True)
class TextConfig:
  path: str
  separator: str | None
  field: str
  subset: str | None
  split: str
  revision: str | None
  order: str
  window: int | None
  context_length: int
  packing: str
  prepend_bos: bool | None
  special_tokens: str
  held_out: float

  def __post_init__(self):
    if self.separator == '':
      raise UserError(
        "config field text.separator: '' divides nothing; set it to None"
      )
    checks.choice('text.order', self.order, ('hash', 'source'))
    if self.window is not None:
      checks.at_least('text.window', self.window, 1)
    checks.choice('text.packing', self.packing, ('stream', 'documents'))
    checks.choice('text.special_tokens', self.special_tokens, ('drop', 'keep'))
    checks.at_least('text.context_length', self.context_length, 2)
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
  batch_contexts: int | None

  def __post_init__(self):
    checks.choice('store.dtype', self.dtype, ('float32', 'bfloat16'))
    sizes = ('tokens', 'chunk_rows', 'shard_rows', 'buffer_rows')
    for name in sizes:
      checks.at_least(f'store.{name}', getattr(self, name), 1)
    if self.batch_contexts is not None:
      checks.at_least('store.batch_contexts', self.batch_contexts, 1)
    for part, whole in itertools.pairwise(sizes[1:]):
      checks.multiple(
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
    checks.choice('loader.source', self.source, ('store', 'memory', 'stream'))
    checks.choice('loader.unit', self.unit, ('chunk', 'shard'))
    checks.at_least('loader.shuffle_rows', self.shuffle_rows, 1)
