"""Reads eval/step_<N>.json, and the sums of documents beside it."""

import dataclasses
import json
from collections.abc import Iterable

import numpy as np
import safetensors.numpy
from etils import epath

from gsae_jax.errors import UserError
from gsae_jax.evaluation import figures, frontiers, metrics
from gsae_jax.evaluation.pareto import Record

# Of what is shown of a record; a metric that is not defined is None.
_NUMBERS = (
  'features', 'seed', 'l1_coefficient', 'tokens_trained', 'num_tokens', 'l0',
  'ce_clean', 'ce_zero_ablation',
)  # fmt: skip
_NUMBERS_OR_NONE = (
  'loss_recovered', 'gamma', 'explained_variance', 'kl_clean_spliced',
  'ce_spliced', 'alive_fraction',
)  # fmt: skip


def records_path(workdir: epath.Path, step: int) -> epath.Path:
  return workdir / 'eval' / f'step_{step}.json'


def documents_path(workdir: epath.Path, step: int) -> epath.Path:
  return workdir / 'eval' / f'step_{step}.documents.safetensors'


@dataclasses.dataclass(frozen=True)
class Documents:
  """What the records of one step were made of.

  Attributes:
    ids: uint64 `[documents]`, of their text.
    sums: by member, `metrics.OF_SITE` and `metrics.OF_SAE`, float64 `[documents]`
      each.
  """

  ids: np.ndarray
  sums: dict[str, dict[str, np.ndarray]]


def pack(documents: Documents, sites: dict[str, str]) -> bytes:
  """The file of `read_documents`; what SAEs of a site share is there once.

  Args:
    documents: what to write.
    sites: of each member.
  """
  arrays = {'ids': documents.ids}
  for member, sums in documents.sums.items():
    for name in metrics.OF_SITE:
      arrays[f'site/{sites[member]}/{name}'] = sums[name]
    for name in metrics.OF_SAE:
      arrays[f'sae/{member}/{name}'] = sums[name]
  return safetensors.numpy.save(arrays)


def read_documents(workdir: epath.Path, step: int) -> Documents | None:
  """The sums of a step that `read_evaluations` knows; None without the file.

  Raises:
    UserError: the file does not go with the records.
  """
  path = documents_path(workdir, step)
  if not path.exists():
    return None
  try:
    arrays = safetensors.numpy.load(path.read_bytes())
    sums = {
      r['member']: {
        name: arrays[f'site/{r["site"]}/{name}'] for name in metrics.OF_SITE
      }
      | {name: arrays[f'sae/{r["member"]}/{name}'] for name in metrics.OF_SAE}
      for r in read_records(records_path(workdir, step))
    }
    for of_member in sums.values():
      for name, values in of_member.items():
        if (values.dtype, values.shape) != (np.float64, arrays['ids'].shape):
          raise ValueError(f'{name} is not a float64 for each document')
    return Documents(arrays['ids'], sums)
  except (KeyError, ValueError, safetensors.SafetensorError) as e:
    raise UserError(
      f'--workdir: {path} does not go with the records beside it ({e}); delete '
      'both and run gsae_jax.evaluate again'
    ) from e


def read_replicates(
  workdir: epath.Path, steps: Iterable[int]
) -> dict[int, frontiers.Replicates]:
  """What intervals are made of, of the steps that have sums of documents."""
  found = {step: read_documents(workdir, step) for step in steps}
  return {
    step: frontiers.replicates(documents.sums)
    for step, documents in found.items()
    if documents is not None
  }


def read_records(path: epath.Path) -> list[Record]:
  """The records of one file.

  Raises:
    UserError: the file is not a list of records.
  """
  try:
    records = json.loads(path.read_text())
    if not records:
      raise ValueError('it is empty')
    for record in records:
      _check(record)
  except (ValueError, TypeError, KeyError, RecursionError) as e:
    raise UserError(
      f'--workdir: {path} is not an evaluation ({e}); delete it and run '
      'gsae_jax.evaluate again'
    ) from e
  return records


def _check(record: Record) -> None:
  """Raises ValueError, TypeError or KeyError unless a record is one."""
  for name in ('member', 'site', 'architecture', 'variant'):
    if not isinstance(record[name], str):
      raise ValueError(f'{name} is {record[name]!r}, which is no text')
  for name in _NUMBERS:
    if not figures.has_place(record[name]):
      raise ValueError(f'{name} is {record[name]!r}, which is no number')
  for name in _NUMBERS_OR_NONE:
    if record[name] is not None and not figures.has_place(record[name]):
      raise ValueError(f'{name} is {record[name]!r}, which is no number')
  record['evaluation']


def read_evaluations(workdir: epath.Path) -> dict[int, list[Record]]:
  """The records of every evaluated step.

  Raises:
    UserError: there are none, or a file is not a list of records.
  """
  evaluations = {
    int(path.stem.removeprefix('step_')): read_records(path)
    for path in (workdir / 'eval').glob('step_*.json')
    if path.stem.removeprefix('step_').isdecimal()
  }
  if not evaluations:
    raise UserError(
      f'--workdir: no evaluations in {workdir}; run gsae_jax.evaluate first, '
      'behind gsae_jax.train'
    )
  return evaluations
