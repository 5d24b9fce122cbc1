r"""Runs what the paper's figures need, with the ordinary commands.

  python -m experiments.paper.study --config=experiments/paper/embedded.py --workdir=DIR

Below --workdir: `store/`, harvested once; `arms/`, both arms at every site of the
config (4.1, 4.2); `ablations/`, Gated's and a baseline of equal width at one site
(5.1, 5.2); `shift/`, rescale & shift on those baselines (5.2). Each run has its
config beside it, as written.py reads it, and its commands are printed. Started
again, it goes on, and passes over what is finished. Exits 42 when preempted.
"""

import dataclasses
import functools
import html
import pathlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections
from absl import flags
from etils import epath

from experiments.paper import arms, runs, written
from gsae_jax import config as config_lib
from gsae_jax import paths, program
from gsae_jax.activations.store import open_store
from gsae_jax.errors import PREEMPTED, Preempted, UserError
from gsae_jax.evaluation import page
from gsae_jax.evaluation.records import records_path
from gsae_jax.parsing import plain

PARTS = ('arms', 'ablations', 'shift')


@dataclasses.dataclass(frozen=True)
class Study:
  """A config, and how it is turned into runs.

  Attributes:
    raw: the config.
    workdir: of the whole study.
    store: where its activations are, or are to be; None where a run makes them
      itself.
    harvested: whether the store is somebody else's, and there already.
    coefficients: of each arm.
    seeds: of each coefficient.
    ablation_site: where variants are trained.
    ablation_coefficients: how many of the coefficients those have.
    preempted: noted signals.
    overlay: rows of the paper to draw, see pareto.py.
  """

  raw: ml_collections.ConfigDict
  workdir: epath.Path
  store: str | None
  harvested: bool
  coefficients: int
  seeds: int
  ablation_site: str
  ablation_coefficients: int
  preempted: Callable[[], bool] = bool
  overlay: str | None = None

  @functools.cached_property
  def pairs(self) -> dict[str, tuple[arms.Arm, arms.Arm]]:
    """Both arms by site."""
    return arms.find(config_lib.parse(self.raw).saes)

  @functools.cached_property
  def members(self) -> dict[str, tuple[arms.Member, ...]]:
    """By part."""
    pair = self.pairs[self.ablation_site]
    ablations = arms.of_ablations(
      pair, (self.coefficients, self.ablation_coefficients), self.seeds
    )
    return {
      'arms': arms.of_arms(self.pairs, self.coefficients, self.seeds),
      'ablations': ablations,
      'shift': arms.of_shift(pair, ablations, str(self.folder('ablations'))),
    }

  @property
  def title(self) -> str:
    """The language model and the sites."""
    name = self.raw.lm.path.rstrip('/').split('/')[-1]
    return f'{name}, {", ".join(self.pairs)}'

  def results(self, *parts: str) -> runs.Run:
    """What parts gave, as one, run before if they have to be."""
    for part in parts:
      if part not in self._read:
        self._read[part] = runs.read(self.run(part))
    return runs.joined([self._read[part] for part in parts])

  @functools.cached_property
  def _read(self) -> dict[str, runs.Run]:
    """By part, those that were asked for."""
    return {}

  def folder(self, part: str) -> epath.Path:
    return self.workdir / part

  def config(self, part: str) -> ml_collections.ConfigDict:
    """The config of one run."""
    c = self.raw.copy_and_resolve_references()
    with c.unlocked():
      c.sites = tuple(self.pairs)
      c.saes = self.members[part]
      if (
        part != 'arms'
      ):  # Whose history is drawn; of the rest, only the end is.
        c.train.checkpoints_kept = 1
        c.train.checkpoints_kept_every = None
    return c

  def run(self, part: str) -> epath.Path:
    """Makes sure that a part is trained and evaluated; returns its workdir.

    Raises:
      UserError: the config is not the one that the folder was begun with.
      Preempted: the command that runs was.
    """
    if part == 'shift':
      self.run('ablations')
    folder, c = self.folder(part), self.config(part)
    path, finished = folder / 'config.json', folder / 'finished.json'
    text, config = written.text(c), config_lib.parse(c)
    _check(path, config)
    last = records_path(folder, config.train.steps)
    if not (
      last.exists() and finished.exists() and finished.read_text() == text
    ):
      paths.write_whole(path, text)
      self._harvest(path)
      own = [f'--workdir={folder}']
      self.command('gsae_jax.train', path, *self._store_flag(), *own)
      self.command('gsae_jax.evaluate', path, *own)
      paths.write_whole(finished, text)
    return folder

  def _store_flag(self) -> list[str]:
    return [f'--store={self.store}'] if self.store else []

  def _harvest(self, config: epath.Path) -> None:
    if self.store is None or self.harvested:
      return
    try:
      open_store(self.store)
    except UserError:  # Missing or unfinished; what else it is, harvest says.
      self.command('gsae_jax.harvest', config, *self._store_flag())

  def command(self, module: str, config: epath.Path, *given: str) -> None:
    """Runs a command on a written config, to its end.

    Raises:
      Preempted: it was, or this process.
      UserError: it was killed.
      SystemExit: it failed, and said why.
    """
    file = pathlib.Path(written.__file__)
    command = [sys.executable, '-m', module]
    command += [f'--config={file}:{config}', *given]
    print('+', shlex.join(command), flush=True)
    # In a group of its own: a signal of the terminal comes once, from here.
    process = subprocess.Popen(command, process_group=0)
    told = False
    try:
      while True:
        try:
          code = process.wait(timeout=0.2)
          break
        except subprocess.TimeoutExpired:
          if self.preempted() and not told:
            # It must not be left alone: whoever asks twice waits for it, too.
            for number in (signal.SIGTERM, signal.SIGINT):
              signal.signal(number, signal.SIG_IGN)
            process.terminate()
            told = True
    finally:
      if process.poll() is None:
        process.terminate()
    if code == PREEMPTED or told:
      raise Preempted
    if code < 0:
      raise UserError(
        f'{module} was ended by signal {-code}; the same command goes on'
      )
    if code:
      raise SystemExit(code)


def _check(path: epath.Path, config: config_lib.Config) -> None:
  """Refuses another config than the one that a folder was begun with."""
  if not (path.exists() and (path.parent / 'checkpoints').exists()):
    return  # Nothing was computed with it.
  try:
    before = config_lib.parse(written.get_config(str(path)))
  except ValueError as e:
    raise UserError(
      f'--workdir: {path} cannot be read ({e}); use another folder'
    ) from e
  there, here = (dict(_flat(_fixed(c))) for c in (before, config))
  members = {n for tree in (there, here) for n in tree if n.startswith('saes.')}
  if members - there.keys() or members - here.keys():
    raise UserError(
      f'--config: {path.parent} was begun with other SAEs (sites, '
      "--coefficients, --seeds and the ablations' flags make them); change that "
      'back or use another --workdir, which may have the same --store'
    )
  differ = [n for n in there if there[n] != here.get(n)]
  if differ:
    more = f', and {len(differ) - 1} more differ' if differ[1:] else ''
    raise UserError(
      f'--config: {path.parent} was begun with {differ[0]}={there[differ[0]]!r}, '
      f'and here it is {here.get(differ[0])!r}{more}; change it back or use '
      'another --workdir'
    )


def _fixed(config: config_lib.Config) -> dict[str, Any]:
  """What may not change between one start of a run and the next."""
  groups = plain(dataclasses.asdict(config))
  return {n: groups[n] for n in ('lm', 'text', 'store')} | config.identity()


def _flat(tree: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
  if isinstance(tree, dict):
    for name, value in tree.items():
      yield from _flat(value, f'{prefix}.{name}' if prefix else name)
  else:
    yield prefix, tree


def define_flags(values: flags.FlagValues) -> None:
  """Adds the flags of every command of this folder."""
  program.define_config(values)
  flags.DEFINE_string(
    'workdir', None, 'Of the whole study.', flag_values=values
  )
  flags.DEFINE_string(
    'store',
    None,
    'An activation store that is there; else one is harvested.',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'coefficients',
    8,
    'L1 coefficients of each arm.',
    lower_bound=2,
    flag_values=values,
  )
  flags.DEFINE_integer(
    'seeds', 3, 'Seeds of each coefficient.', lower_bound=1, flag_values=values
  )
  flags.DEFINE_string(
    'ablation_site',
    None,
    "Of the variants; None is the config's first site.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    'ablation_coefficients',
    4,
    'L1 coefficients of each variant.',
    lower_bound=2,
    flag_values=values,
  )
  flags.DEFINE_string(
    'overlay',
    None,
    "The paper's rows in pareto.py's figures, as MODEL:SITE.",
    flag_values=values,
  )
  flags.mark_flags_as_required(['config', 'workdir'], values)


def read(given: flags.FlagValues) -> Study:
  """Returns the study that the parsed flags describe.

  Raises:
    UserError: they do not fit together.
  """
  raw = program.read_config(given)
  parsed = config_lib.parse(raw)
  sites = tuple(arms.find(parsed.saes))
  chosen = given.ablation_site or sites[0]
  if chosen not in sites:
    raise UserError(
      f'--ablation_site: {chosen!r} has not both arms; {", ".join(sites)} do'
    )
  if given.ablation_coefficients > given.coefficients:
    raise UserError(
      f'--ablation_coefficients: {given.ablation_coefficients} of {given.coefficients} '
      '--coefficients; give fewer'
    )
  folder = paths.workdir(given.workdir)
  own = str(folder / 'store')
  if parsed.loader.source == 'stream':
    own = None
  return Study(
    raw,
    folder,
    given.store or own,
    given.store is not None,
    given.coefficients,
    given.seeds,
    chosen,
    given.ablation_coefficients,
    program.Preemption().__bool__,
    given.overlay,
  )


def command(main: Callable[[Study], None]) -> program.Command:
  """Returns the command that passes the study that flags describe to `main`."""
  return program.Command(define_flags, lambda given: main(read(given)))


def draw(name: str, make: Callable[[Study], str]) -> None:
  """Runs a command that writes one figure, NAME.html in the workdir.

  Args:
    name: of the file, and its title.
    make: its HTML.
  """

  def main(study: Study) -> None:
    path = study.workdir / f'{name}.html'
    title = f'{name}: {study.title}'
    text = page.document(title, f'<h1>{html.escape(title)}</h1>{make(study)}')
    paths.write_whole(path, text)
    print(path)

  command(main).run()


def _everything(study: Study) -> None:
  for part in PARTS:
    print(f'{part}: {study.run(part)}')


COMMAND = command(_everything)

if __name__ == '__main__':
  COMMAND.run()
