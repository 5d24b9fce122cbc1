"""What runs gave, read back: records, and what their intervals are made of."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from etils import epath

from experiments.paper import written
from gsae_jax import config as config_lib
from gsae_jax.errors import UserError
from gsae_jax.evaluation import frontiers, records
from gsae_jax.evaluation.frontiers import Replicates
from gsae_jax.evaluation.pareto import Record


@dataclasses.dataclass(frozen=True)
class Run:
  """Records by step, with what belongs to them.

  Attributes:
    evaluations: records by step.
    documents: sums by step.
    rates: learning rate of each member.
  """

  evaluations: dict[int, list[Record]]
  documents: dict[int, records.Documents]
  rates: dict[str, float]

  @functools.cached_property
  def last(self) -> list[Record]:
    """The records of the last step."""
    return self.evaluations[max(self.evaluations)]

  @functools.cached_property
  def replicates(self) -> dict[int, Replicates]:
    """By step."""
    return {
      step: frontiers.replicates(found.sums)
      for step, found in self.documents.items()
    }

  @property
  def resampled(self) -> Replicates:
    """Of the last step."""
    return self.replicates[max(self.evaluations)]

  @property
  def sites(self) -> list[str]:
    """In the order of the records."""
    return list(dict.fromkeys(r['site'] for r in self.last))

  def at(self, site: str, *names: str) -> list[Record]:
    """The last records of a site, of members whose names begin like this.

    What `arms` makes is named by its kind and its site.
    """
    wanted = tuple(f'{name}_{site}_' for name in names)
    return [r for r in self.last if r['member'].startswith(wanted)]


def documents_of(workdir: epath.Path, step: int) -> records.Documents:
  """The sums of a step.

  Raises:
    UserError: they are gone.
  """
  found = records.read_documents(workdir, step)
  if found is None:
    raise UserError(
      f'--workdir: {records.documents_path(workdir, step)} is missing; delete '
      f'{workdir / "eval"} and run the same command again'
    )
  return found


def read(workdir: epath.Path) -> Run:
  """Reads the folder of one run.

  Raises:
    UserError: it has not been evaluated, or a file is damaged.
  """
  evaluations = records.read_evaluations(workdir)
  documents = {step: documents_of(workdir, step) for step in evaluations}
  c = config_lib.parse(written.get_config(str(workdir / 'config.json')))
  rates = {s.name: s.learning_rate or c.train.learning_rate for s in c.saes}
  return Run(evaluations, documents, rates)


def joined(found: Sequence[Run]) -> Run:
  """The last steps of runs, as one run.

  Raises:
    UserError: they were evaluated on different documents.
  """
  if len(found) == 1:
    return found[0]
  steps = [max(run.evaluations) for run in found]
  documents = [r.documents[s] for r, s in zip(found, steps, strict=True)]
  # By tokens, too: of few documents, others may be evaluated for as long.
  tokens = [next(iter(d.sums.values()))['tokens'] for d in documents]
  ids = [d.ids for d in documents]
  if not all(np.array_equal(a[0], other) for a in (ids, tokens) for other in a):
    raise UserError(
      '--workdir: its runs were evaluated on different documents; delete their '
      'eval folders and run the same command again'
    )
  sums, rates = {}, {}
  for run, step in zip(found, steps, strict=True):
    sums |= run.documents[step].sums
    rates |= run.rates
  last = max(steps)
  together = [r for run in found for r in run.last]
  return Run({last: together}, {last: records.Documents(ids[0], sums)}, rates)
