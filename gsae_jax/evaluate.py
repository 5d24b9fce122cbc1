r"""Evaluates the checkpoints of a run on held-out text.

  python -m gsae_jax.evaluate --config=experiments/quickstart.py --workdir=DIR
  python -m gsae_jax.evaluate ... --watch     follows a training run to its end

Writes `eval/step_<N>.json` for every checkpoint that has none yet, and prints
the table of the latest.
"""

import dataclasses
import json
import time

import jax
import tqdm
from absl import flags
from etils import epath

from gsae_jax import config as config_lib
from gsae_jax import program
from gsae_jax.activations.store import differences
from gsae_jax.errors import UserError
from gsae_jax.evaluation import metrics, pareto, splice
from gsae_jax.evaluation.records import read_evaluations
from gsae_jax.lm import text as text_lib
from gsae_jax.lm.weights import load_language_model
from gsae_jax.sae import ARCHITECTURES
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
    trained: identity of the store that the SAEs were trained on.

  Raises:
    UserError: the language model or the token policy is not the one that the
      SAEs were trained with.
  """
  if config.eval.batch_size % jax.device_count():
    raise UserError(
      f'eval.batch_size: {config.eval.batch_size} is not divisible by '
      f'{jax.device_count()} devices'
    )
  lm = load_language_model(**dataclasses.asdict(config.lm))
  text = dataclasses.asdict(config.text)
  here = {'lm': lm.identity, 'text': text}
  there = {'lm': trained['lm'], 'text': dict(trained['text'])}
  # Evaluating on another text is a fair thing to do.
  for name in ('path', 'separator', 'documents'):
    here['text'].pop(name, None)
    there['text'].pop(name, None)
  different = differences(there, here)
  if different:
    raise UserError(
      f'--config: the SAEs were trained on other activations ({different[0]}); '
      'use the config that they were trained with'
    )
  documents = text_lib.read_documents(config.text.path, config.text.separator)
  contexts = text_lib.pack(
    text_lib.split(documents, config.text.held_out, 'held_out'),
    lm.tokenizer,
    context_length=config.text.context_length,
    packing=config.text.packing,
    prepend_bos=config.text.prepend_bos,
    special_tokens=config.text.special_tokens,
    rows=config.eval.tokens,
  )
  return splice.Evaluator(
    lm,
    contexts,
    tokens=config.eval.tokens,
    batch_size=config.eval.batch_size,
    parallel=config.eval.parallel,
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
      ARCHITECTURES[m['architecture']](
        width=m['width'], features=m['features']
      ),
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
        'features': m['features'],
        'l1_coefficient': m['l1'],
        'seed': trained['config']['seed'] if m['seed'] is None else m['seed'],
        'step': step,
        'tokens_trained': step * trained['config']['train']['batch_size'],
        **metrics.record(*sums),
      }
    )
  return records


def main() -> int:
  config = config_lib.parse(program.read_config(_CONFIG))
  preempted = program.Preemption()
  folder = epath.Path(_WORKDIR.value).expanduser() / 'eval'
  evaluator = None
  records = None
  last = config.train.steps
  while True:
    with Checkpoints(_WORKDIR.value, kept=None, read_only=True) as checkpoints:
      steps = checkpoints.steps()
      paths = {step: folder / f'step_{step}.json' for step in steps}
      todo = [step for step in steps if not paths[step].exists()]
      if steps and evaluator is None:
        metadata = checkpoints.metadata(steps[-1])
        last = metadata['config']['train']['steps']
        if todo:
          evaluator = make_evaluator(config, metadata['store_identity'])
      for step in tqdm.tqdm(todo, unit='checkpoint', disable=not todo):
        if preempted:
          return program.PREEMPTED
        records = evaluate_step(evaluator, checkpoints, step)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f'step_{step}.json.part'
        part.write_text(json.dumps(records, indent=1) + '\n')
        part.replace(paths[step])
    if not _WATCH.value or last in steps:
      break
    if preempted:
      return program.PREEMPTED
    time.sleep(_POLL.value)
  if not steps:
    raise UserError(
      f'--workdir: no finished checkpoint in {_WORKDIR.value}; run '
      'gsae_jax.train, or wait for it with --watch'
    )
  print(pareto.summary(read_evaluations(folder.parent)))
  return 0


if __name__ == '__main__':
  program.run(main)
