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


def define_flags(values: flags.FlagValues) -> None:
  """Adds the flags of this command."""
  flags.DEFINE_string(
    'workdir',
    None,
    'Run folder that train and evaluate wrote.',
    flag_values=values,
  )
  flags.mark_flag_as_required('workdir', values)


def main(given: flags.FlagValues) -> int:
  workdir = paths.workdir(given.workdir)
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


COMMAND = program.Command(define_flags, main)

if __name__ == '__main__':
  COMMAND.run()
