r"""Draws a run's evaluations and training curves as one HTML file.

  python -m gsae_jax.report --workdir=DIR        -> DIR/report.html

Reads `eval/step_<N>.json` and `metrics.jsonl` and nothing else.
"""

import json

from absl import flags
from etils import epath

from gsae_jax import program
from gsae_jax.errors import UserError
from gsae_jax.evaluation import page
from gsae_jax.training.records import read_metrics

_WORKDIR = flags.DEFINE_string('workdir', None, 'Of train and evaluate.')
flags.mark_flag_as_required('workdir')


def read_evaluations(workdir: epath.Path) -> dict[int, list[dict]]:
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


def main() -> int:
  workdir = epath.Path(_WORKDIR.value).expanduser()
  text = page.render(
    '/'.join(workdir.absolute().parts[-2:]),
    read_evaluations(workdir),
    read_metrics(workdir / 'metrics.jsonl'),
  )
  path = workdir / 'report.html'
  path.write_text(text)
  print(path)
  return 0


if __name__ == '__main__':
  program.run(main)
