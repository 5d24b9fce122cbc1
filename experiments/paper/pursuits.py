r"""Evaluates dictionaries of a run without their encoders (Appendix A).

  python -m experiments.paper.pursuits --config=experiments/paper/written.py:DIR/arms/config.json \
      --workdir=DIR/arms --members=NAME,NAME --out=DIR/ito

For each SAE: itself, gradient pursuit at every K, and, of the first seed, matching
pursuit beside it, all on the tokens of gsae_jax.evaluate, whose flags and evaluator these are. Writes what it
writes, below --out. ito.py chooses the SAEs and draws the result.
"""

import dataclasses
import json

from absl import flags

from gsae_jax import config as config_lib
from gsae_jax import evaluate, paths, program
from gsae_jax.errors import UserError
from gsae_jax.evaluation import metrics, records
from gsae_jax.evaluation.pursuit import METHODS, Pursuit
from gsae_jax.sae import make_module
from gsae_jax.training.checkpoints import Checkpoints


def define_flags(values: flags.FlagValues) -> None:
  """Adds the flags of this command, and those of gsae_jax.evaluate."""
  evaluate.define_flags(values)
  flags.DEFINE_list('members', None, 'Names of the SAEs.', flag_values=values)
  flags.DEFINE_list(
    'k',
    '5,10,20,40',
    'Atoms per token; those above the width are left out.',
    flag_values=values,
  )
  flags.DEFINE_string('out', None, 'Where to write.', flag_values=values)
  flags.mark_flags_as_required(['members', 'out'], values)


def variants(name: str, member: dict, params: dict, ks: list[int]) -> dict:
  """By name: what the record says of it, and what the evaluator takes."""
  site = member['site']
  found = {
    name: (
      {'method': 'encoder', 'k': None},
      (make_module(member), site, params),
    )
  }
  decoder = {k: params[k] for k in ('W_dec', 'b_dec')}
  for method in METHODS if member['seed'] == 0 else METHODS[:1]:
    for k in ks:
      module = Pursuit(member['width'], member['features'], k, method)
      found[f'{name}.{method}.{k}'] = (
        {'method': method, 'k': k},
        (module, site, decoder),
      )
  return found


def main(given: flags.FlagValues) -> int:
  preempted = program.Preemption()
  config = config_lib.parse(program.read_config(given))
  workdir = paths.workdir(given.workdir)
  with Checkpoints(str(workdir), read_only=True) as checkpoints:
    step = checkpoints.steps()[-1]
    trained = checkpoints.metadata(step)
    members = {m['name']: m for m in trained['members']}
    unknown = [name for name in given.members if name not in members]
    if unknown:
      raise UserError(f'--members: {workdir} has no SAE {unknown[0]!r}')
    params = checkpoints.restore_params(
      step, {name: members[name]['shapes'] for name in given.members}
    )
  own = dataclasses.replace(config.eval, special_tokens='text')
  config = dataclasses.replace(config, eval=own)
  evaluator = evaluate.make_evaluator(config, trained)
  values, sums, sites = [], {}, {}
  for dictionary in given.members:
    preempted.check()
    m = members[dictionary]
    ks = [k for k in map(int, given.k) if k <= m['width']]
    tried = variants(dictionary, m, params[dictionary], ks)
    found = evaluator.run({name: sae for name, (_, sae) in tried.items()})
    for name, (about, _) in tried.items():
      measured = found[name][0]
      sums[name], sites[name] = measured.sums, m['site']
      values.append(
        {
          'member': name,
          'dictionary': dictionary,
          **about,
          'site': m['site'],
          'architecture': m['architecture'],
          'variant': '' if about['k'] is None else f'{about["method"]} pursuit',
          'features': m['features'],
          'l1_coefficient': m['l1'],
          'seed': m['seed'],
          'step': step,
          'tokens_trained': step * config.train.batch_size,
          **metrics.record(measured.sums, measured.fired_F),
          'evaluation': evaluate.settings(config, False),
        }
      )
  out = paths.workdir(given.out)
  documents = records.Documents(evaluator.ids, sums)
  paths.write_whole(
    records.documents_path(out, step), records.pack(documents, sites)
  )
  text = json.dumps(values, indent=1, allow_nan=False) + '\n'
  paths.write_whole(records.records_path(out, step), text)
  print(f'{len(values)} records in {out}')
  return 0


COMMAND = program.Command(define_flags, main)

if __name__ == '__main__':
  COMMAND.run()
