r"""Evaluates the checkpoints of a run on held-out text.

  python -m gsae_jax.evaluate --config=experiments/quickstart.py --workdir=DIR
  python -m gsae_jax.evaluate ... --watch     follows a training run to its end

Writes `eval/step_<N>.json`, and what goes with it, for every checkpoint that has
none of this `config.eval` yet, and prints the table of the latest. Run by several
processes (--coordinator), each takes a share of the contexts.
"""

import dataclasses
import json
import time

import jax
import numpy as np
import tqdm
from absl import flags
from etils import epath

from gsae_jax import config as config_lib
from gsae_jax import paths, processes, program
from gsae_jax.activations.store import differences
from gsae_jax.errors import UserError
from gsae_jax.evaluation import features, metrics, pareto, records, splice
from gsae_jax.lm import text as text_lib
from gsae_jax.lm.layouts import make_layout
from gsae_jax.lm.weights import load_language_model
from gsae_jax.sae import make_module, variant
from gsae_jax.training.checkpoints import Checkpoints

# What a record calls the figures of the other policy for special tokens.
OTHER_WAY = {'drop': 'with_special_tokens', 'keep': 'without_special_tokens'}


def define_flags(values: flags.FlagValues) -> None:
  """Adds the flags of this command."""
  program.define_config(values)
  processes.define_flags(values)
  flags.DEFINE_string(
    'workdir',
    None,
    'Run folder that gsae_jax.train wrote.',
    flag_values=values,
  )
  flags.DEFINE_bool(
    'watch',
    False,
    'Wait for new checkpoints until the last one.',
    flag_values=values,
  )
  flags.DEFINE_float(
    'poll_seconds', 5.0, 'How often --watch looks.', flag_values=values
  )
  flags.mark_flags_as_required(['config', 'workdir'], values)


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
    stride=config.eval.stride,
  ).windows
  return splice.Evaluator(
    lm,
    contexts,
    tokens=config.eval.tokens,
    batch_size=config.eval.batch_size,
    parallel=config.eval.parallel,
    layout=layout,
    both=config.eval.special_tokens == 'both',
    processes=splice.Processes(
      jax.process_index(), jax.process_count(), processes.gathered
    ),
  )


def has_dashboards(config: config_lib.Config, trained: dict, step: int) -> bool:
  """Whether the features of a step are to be written."""
  last = step == trained['config']['train']['steps']
  return config.eval.dashboards in (('all', 'last') if last else ('all',))


def evaluate_step(
  config: config_lib.Config,
  evaluator: splice.Evaluator,
  checkpoints: Checkpoints,
  step: int,
) -> dict[str, bytes | str]:
  """What is written of one checkpoint.

  Returns:
    contents by path below the workdir's `eval`, the records last; empty but for
    the first process.
  """
  trained = checkpoints.metadata(step)
  members = {m['name']: m for m in trained['members']}
  params = checkpoints.restore_params(
    step, {name: m['shapes'] for name, m in members.items()}
  )
  saes = {
    name: (make_module(m), m['site'], params[name])
    for name, m in members.items()
  }
  dashboards = has_dashboards(config, trained, step)
  measured = evaluator.run(
    saes, top_contexts=config.eval.top_contexts if dashboards else 0
  )
  if jax.process_index():
    return {}
  name = f'step_{step}'
  out: dict[str, bytes | str] = {}
  if dashboards:
    contexts = {'ids': evaluator.contexts_CL, 'mask': evaluator.mask_CL}
    out[f'{name}.features/contexts.safetensors'] = features.pack(contexts)
    for member, (_, site, p) in saes.items():
      effects = evaluator.logit_effects(
        site, p['W_dec'], config.eval.top_logits
      )
      out[f'{name}.features/{member}.safetensors'] = features.pack(
        features.of(measured[member][0], effects)
      )
  documents = records.Documents(
    evaluator.ids, {k: found[0].sums for k, found in measured.items()}
  )
  sites = {k: m['site'] for k, m in members.items()}
  out[f'{name}.documents.safetensors'] = records.pack(documents, sites)
  batch_size = trained['config']['train']['batch_size']
  values = [
    {
      'member': k,
      'site': m['site'],
      'architecture': m['architecture'],
      'variant': variant(m),
      'features': m['features'],
      'l1_coefficient': m['l1'],
      'seed': m['seed'],
      'step': step,
      'tokens_trained': step * batch_size,
      **record(config, measured[k]),
      'evaluation': settings(config, dashboards),
    }
    for k, m in members.items()
  ]
  out[f'{name}.json'] = json.dumps(values, indent=1, allow_nan=False) + '\n'
  return out


def record(
  config: config_lib.Config, measured: tuple[splice.Measured, ...]
) -> dict:
  """The measured part of a record, and the same counted the other way."""
  first, *other = (metrics.record(m.sums, m.fired_F) for m in measured)
  if other:
    (first[OTHER_WAY[config.text.special_tokens]],) = other
  return first


def settings(config: config_lib.Config, dashboards: bool) -> dict:
  """What an evaluation depends on; batches and devices are not among it."""
  names = ['stride', 'special_tokens']
  if dashboards:
    names += ['top_contexts', 'top_logits']
  about = {name: getattr(config.eval, name) for name in names}
  return about | {'text': config.text.path, 'dashboards': dashboards}


def is_done(
  config: config_lib.Config, workdir: epath.Path, trained: dict, step: int
) -> bool:
  """Whether a checkpoint was evaluated already, as the config says."""
  path = records.records_path(workdir, step)
  if not path.exists():
    return False
  first = records.read_records(path)[0]
  wanted = settings(config, has_dashboards(config, trained, step))
  return (
    first['num_tokens'] == config.eval.tokens and first['evaluation'] == wanted
  )


def evaluate_new(
  config: config_lib.Config,
  workdir: epath.Path,
  make,
  preempted: program.Preemption,
  *,
  watch: bool,
) -> bool:
  """Evaluates the checkpoints that wait for it; True if none is to come."""
  first = jax.process_index() == 0
  with Checkpoints(str(workdir), read_only=True) as checkpoints:
    with processes.together():
      steps = checkpoints.steps()
      trained = {step: checkpoints.metadata(step) for step in steps}
      todo = [s for s in steps if not is_done(config, workdir, trained[s], s)]
    if steps and not todo and not watch and first:
      print(
        f'{len(steps)} checkpoint(s) were evaluated before; to do it again, delete '
        f'{workdir / "eval"}'
      )
    # The processes may not see the same files at the same time.
    last = (
      bool(steps) and trained[steps[-1]]['config']['train']['steps'] in steps
    )
    count, last = processes.agreed(np.array([len(todo), last], np.int32))
    for i in tqdm.tqdm(
      range(count), unit='checkpoint', disable=not (count and first)
    ):
      step = int(processes.agreed(np.int32(todo[i] if first else 0)))
      with processes.together():
        preempted.check()
        evaluator = make(config, checkpoints.metadata(step))
      with processes.leaving_with_the_others():
        contents = evaluate_step(config, evaluator, checkpoints, step)
      with processes.together():
        stale = features.folder(workdir, step)
        if contents and stale.exists():  # Of another evaluation.
          stale.rmtree()
        for name, content in contents.items():
          paths.write_whole(workdir / 'eval' / name, content)
    return bool(last)


def main(given: flags.FlagValues) -> int:
  processes.initialize(given)
  preempted = program.Preemption()
  with processes.together():
    config = config_lib.parse(program.read_config(given))
    workdir = paths.workdir(given.workdir)
  made: list[splice.Evaluator] = []

  def make(*args):
    if not made:  # Once: the checkpoints of a run share their store.
      made.append(make_evaluator(*args))
    return made[0]

  while True:
    # With --watch, the training run may not have begun.
    begun = (workdir / 'checkpoints').exists() or not given.watch
    last = False
    if processes.agreed(np.int32(begun)):
      last = evaluate_new(config, workdir, make, preempted, watch=given.watch)
    if last or not given.watch:
      break
    with processes.together():
      preempted.check()
    time.sleep(given.poll_seconds)
  if jax.process_index() == 0:
    found = records.read_evaluations(workdir)
    print(pareto.summary(found, records.read_replicates(workdir, found)))
  return 0


COMMAND = program.Command(define_flags, main)

if __name__ == '__main__':
  COMMAND.run()
