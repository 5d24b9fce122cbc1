r"""Evaluates the checkpoints of a run on held-out text.

  python -m gsae_jax.evaluate --config=experiments/quickstart.py --workdir=DIR
  python -m gsae_jax.evaluate ... --watch     follows a training run to its end

Writes `eval/step_<N>.json` for every checkpoint that has none of `eval.tokens`
tokens yet, and prints the table of the latest.
"""

import dataclasses
import json
import time

import jax
import tqdm
from absl import flags
from etils import epath

from gsae_jax import config as config_lib
from gsae_jax import paths, program
from gsae_jax.activations.store import differences
from gsae_jax.errors import PREEMPTED, UserError
from gsae_jax.evaluation import metrics, pareto, splice
from gsae_jax.evaluation.records import read_evaluations, read_records
from gsae_jax.lm import text as text_lib
from gsae_jax.lm.layouts import make_layout
from gsae_jax.lm.weights import load_language_model
from gsae_jax.sae import make_module, variant
from gsae_jax.training.checkpoints import Checkpoints

_CONFIG = program.define_config()
_WORKDIR = flags.DEFINE_string('workdir', None, 'Of gsae_jax.train.')
_WATCH = flags.DEFINE_bool(
  'watch', False, 'Wait for new checkpoints until the last one.'
)
_POLL = flags.DEFINE_float('poll_seconds', 5.0, 'How often --watch looks.')
flags.mark_flags_as_required(['config', 'workdir'])


def make_evaluator(
  config: config_lib.Config, trained: dict
) -> splice.Evaluator:
  """The evaluator that a run's checkpoints call for.

  Args:
    config: the experiment.
    trained: metadata of a checkpoint.

  Raises:
    UserError: the language model or the token policy is not the one that the
      SAEs were trained with.
  """
  lm = load_language_model(
    config.lm.path, revision=config.lm.revision, dtype=config.lm.dtype
  )
  layout = make_layout(
    config.lm.layout,
    lm.module.config,
    lm.bytes,
    jax.local_devices(),
    config.mesh.model,
  )
  text = text_lib.resolve(dataclasses.asdict(config.text), lm.tokenizer)
  here = {'lm': lm.identity, 'text': dict(text)}
  there = {
    'lm': trained['store_identity']['lm'],
    'text': dict(trained['store_identity']['text']),
  }
  # Which documents are held out does not depend on these.
  for name in (
    'path', 'documents', 'subset', 'split', 'revision', 'order', 'window'
  ):  # fmt: skip
    here['text'].pop(name, None)
    there['text'].pop(name, None)
  if text['path'] != trained['store_provenance']['text_path']:
    # Evaluating on another text is a fair thing to do. On the same one, other
    # documents would be held out than those that training left alone.
    for name in ('separator', 'field'):
      here['text'][name] = there['text'][name]
  different = differences(there, here)
  if different:
    raise UserError(
      f'--config: the SAEs were trained on other activations ({different[0]}); '
      'use the config that they were trained with'
    )
  (contexts,) = text_lib.prepare(
    text | {'window': None},
    lm.tokenizer,
    part='held_out',
    rows=config.eval.tokens,
  ).windows
  return splice.Evaluator(
    lm,
    contexts,
    tokens=config.eval.tokens,
    batch_size=config.eval.batch_size,
    parallel=config.eval.parallel,
    layout=layout,
  )


def evaluate_step(
  evaluator: splice.Evaluator, checkpoints: Checkpoints, step: int
) -> list[dict]:
  """The records of one checkpoint, in the order of the config's members."""
  trained = checkpoints.metadata(step)
  members = {m['name']: m for m in trained['members']}
  params = checkpoints.restore_params(
    step, {name: m['shapes'] for name, m in members.items()}
  )
  saes = {
    name: (
      make_module(m),
      m['site'],
      params[name],
    )
    for name, m in members.items()
  }
  records = []
  for name, sums in evaluator.run(saes).items():
    m = members[name]
    records.append(
      {
        'member': name,
        'site': m['site'],
        'architecture': m['architecture'],
        'variant': variant(m),
        'features': m['features'],
        'l1_coefficient': m['l1'],
        'seed': m['seed'],
        'step': step,
        'tokens_trained': step * trained['config']['train']['batch_size'],
        **metrics.record(*sums),
      }
    )
  return records


def is_done(path: epath.Path, tokens: int) -> bool:
  """Whether a checkpoint was evaluated already, on so many tokens."""
  return path.exists() and read_records(path)[0]['num_tokens'] == tokens


def evaluate_new(
  config: config_lib.Config, workdir: epath.Path, make, preempted
) -> bool:
  """Evaluates the checkpoints that wait for it; True if none is to come."""
  with Checkpoints(str(workdir), read_only=True) as checkpoints:
    steps = checkpoints.steps()
    files = {step: workdir / 'eval' / f'step_{step}.json' for step in steps}
    todo = [s for s in steps if not is_done(files[s], config.eval.tokens)]
    if steps and not todo and not _WATCH.value:
      print(
        f'{len(steps)} checkpoint(s) were evaluated before; to do it again, delete '
        f'{workdir / "eval"}'
      )
    for step in tqdm.tqdm(todo, unit='checkpoint', disable=not todo):
      if preempted:
        return False
      evaluator = make(config, checkpoints.metadata(step))
      records = evaluate_step(evaluator, checkpoints, step)
      text = json.dumps(records, indent=1, allow_nan=False) + '\n'
      paths.write_whole(files[step], text)
    if not steps:
      return False
    return checkpoints.metadata(steps[-1])['config']['train']['steps'] in steps


def main() -> int:
  config = config_lib.parse(program.read_config(_CONFIG))
  preempted = program.Preemption()
  workdir = paths.workdir(_WORKDIR.value)
  made = []

  def make(*args):
    if not made:  # Once: the checkpoints of a run share their store.
      made.append(make_evaluator(*args))
    return made[0]

  while True:
    last = False
    # With --watch, the training run may not have begun.
    if (workdir / 'checkpoints').exists() or not _WATCH.value:
      last = evaluate_new(config, workdir, make, preempted)
    if preempted and not last:
      return PREEMPTED
    if last or not _WATCH.value:
      break
    time.sleep(_POLL.value)
  print(pareto.summary(read_evaluations(workdir)))
  return 0


if __name__ == '__main__':
  program.run(main)
