"""Reads eval/step_<N>.json."""

import json

from etils import epath

from gsae_jax.errors import UserError
from gsae_jax.evaluation.pareto import Record


def read_evaluations(workdir: epath.Path) -> dict[int, list[Record]]:
  """The records of every evaluated step.

  Raises:
    UserError: there are none, or a file is not JSON.
  """
  evaluations = {}
  for path in sorted((workdir / 'eval').glob('step_*.json')):
    try:
      evaluations[int(path.stem.removeprefix('step_'))] = json.loads(
        path.read_text()
      )
    except ValueError as e:
      raise UserError(
        f'--workdir: {path} is not an evaluation ({e}); delete it and run '
        'gsae_jax.evaluate again'
      ) from e
  if not evaluations:
    raise UserError(
      f'--workdir: no evaluations in {workdir}; run gsae_jax.evaluate first'
    )
  return evaluations
