r"""Draws a run's evaluations and training curves as one HTML file.

  python -m gsae_jax.report --workdir=DIR        -> DIR/report.html

Reads `eval/step_<N>.json`, the sums of documents beside them, without which
frontiers have no intervals, and `metrics.jsonl`, and nothing else.
"""

from absl import flags

from gsae_jax import paths, program
from gsae_jax.evaluation import page
from gsae_jax.evaluation.records import read_evaluations, read_replicates
from gsae_jax.training.records import read_metrics

_WORKDIR = flags.DEFINE_string('workdir', None, 'Of train and evaluate.')
flags.mark_flag_as_required('workdir')


def main() -> int:
  workdir = paths.workdir(_WORKDIR.value)
  evaluations = read_evaluations(workdir)
  text = page.render(
    '/'.join(workdir.parts[-2:]),
    evaluations,
    read_metrics(workdir / 'metrics.jsonl'),
    read_replicates(workdir, evaluations),
  )
  path = workdir / 'report.html'
  paths.write_whole(path, text)
  print(path)
  return 0


if __name__ == '__main__':
  program.run(main)
