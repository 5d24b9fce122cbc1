"""Reads eval/step_<N>.json."""

import json

from etils import epath

from gsae_jax.errors import UserError
from gsae_jax.evaluation import pareto
from gsae_jax.evaluation.pareto import Record


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
      pareto.cells(record)
      record['num_tokens']
  except (ValueError, TypeError, KeyError) as e:
    raise UserError(
      f'--workdir: {path} is not an evaluation ({e}); delete it and run '
      'gsae_jax.evaluate again'
    ) from e
  return records


def read_evaluations(workdir: epath.Path) -> dict[int, list[Record]]:
  """The records of every evaluated step.

  Raises:
    UserError: there are none, or a file is not a list of records.
  """
  evaluations = {
    int(path.stem.removeprefix('step_')): read_records(path)
    for path in (workdir / 'eval').glob('step_*.json')
  }
  if not evaluations:
    raise UserError(
      f'--workdir: no evaluations in {workdir}; run gsae_jax.evaluate first, '
      'behind gsae_jax.train'
    )
  return evaluations
