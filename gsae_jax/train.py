r"""Trains the SAEs of a config from an activation store.

  python -m gsae_jax.train --config=experiments/quickstart.py --store=DIR \
      --workdir=DIR

Started again, it goes on from the latest checkpoint. Exits 42 when preempted.
In several processes: --coordinator, --processes and --process, as for harvest.
With loader.source='stream' there is no --store: the language model runs along.
"""

import dataclasses

import jax
import numpy as np
from absl import flags

from gsae_jax import config as config_lib
from gsae_jax import processes, program
from gsae_jax.activations.loader import Loader
from gsae_jax.activations.source import open_source
from gsae_jax.activations.store import Store, check_site, open_store
from gsae_jax.activations.stream import Stream
from gsae_jax.errors import PREEMPTED, UserError
from gsae_jax.lm.weights import load_language_model
from gsae_jax.mesh import make_mesh
from gsae_jax.parsing import plain
from gsae_jax.restore import load
from gsae_jax.training import checkpoints, loop


def define_flags(values: flags.FlagValues) -> None:
  """Adds the flags of this command."""
  program.define_config(values)
  processes.define_flags(values)
  flags.DEFINE_string(
    'store',
    None,
    'The activation store: a folder, gs:// or s3://.',
    flag_values=values,
  )
  flags.DEFINE_string(
    'workdir',
    None,
    'Checkpoints and metrics: a folder or gs://.',
    flag_values=values,
  )
  flags.DEFINE_multi_string(
    'allow-config-change',
    [],
    "A field of the config, or 'store', that may differ from what the "
    'checkpoints in --workdir were trained with, as in train.steps; may be given '
    'repeatedly.',
    flag_values=values,
  )
  flags.mark_flags_as_required(['config', 'workdir'], values)


def is_lm_of(store: Store, lm: config_lib.LMConfig) -> bool:
  """Whether a model at another path is the one that filled the store."""
  opened = load_language_model(lm.path, revision=lm.revision, dtype=lm.dtype)
  return opened.identity == store.identity['lm']


def check_store(config: config_lib.Config, store: Store) -> None:
  """Refuses a store that another kind of config made.

  It may hold more rows or sites than this config asks for.

  Raises:
    UserError: names the first setting that differs.
  """
  here = {'lm.dtype': config.lm.dtype, 'store.dtype': config.store.dtype}
  there = {
    'lm.dtype': store.identity['lm']['dtype'],
    'store.dtype': store.identity['store']['dtype'],
  }
  for name in ('lm_path', 'lm_revision'):
    field = name.replace('_', '.')
    here[field] = getattr(config.lm, name[3:])
    there[field] = store.provenance[name]
  if here['lm.path'] != there['lm.path'] and is_lm_of(store, config.lm):
    del here['lm.path'], here['lm.revision']
  text = dataclasses.asdict(config.text)
  if config.text.prepend_bos is None:  # The model's, which is the store's.
    del text['prepend_bos']
  for name, value in text.items():
    if name in store.identity['text']:
      here[f'text.{name}'] = value
      there[f'text.{name}'] = store.identity['text'][name]
  for name, value in here.items():
    if there[name] != value:
      raise UserError(
        f'--store: {store.path} was harvested with {name}={there[name]!r}, and '
        f'the config has {value!r}; change the config or harvest into another '
        'folder'
      )


def open_loader(
  store_path: str | None,
  config: config_lib.Config,
  preempted: program.Preemption,
) -> Loader | Stream:
  """What gives the batches that a config asks for, and their store.

  Raises:
    UserError: --store is missing or does not fit, or there is one too many.
  """
  settings = config.loader
  sites = tuple(dict.fromkeys(m.site for m in config.saes))
  if settings.source == 'stream':
    if store_path is not None:
      raise UserError(
        "loader.source: 'stream' makes activations anew; leave --store out"
      )
    return _open_stream(config, sites, preempted)
  if store_path is None:
    raise UserError(
      '--store is missing; give the one that gsae_jax.harvest wrote, or set '
      "loader.source to 'stream'"
    )
  store = open_store(store_path)
  check_store(config, store)
  for member in config.saes:
    check_site(store, member.site, member.name)
  return Loader(
    store,
    sites,
    batch_size=config.train.batch_size,
    seed=config.seed,
    unit=settings.unit,
    shuffle_rows=settings.shuffle_rows,
    in_memory=settings.source == 'memory',
  )


def _open_stream(
  config: config_lib.Config,
  sites: tuple[str, ...],
  preempted: program.Preemption,
) -> Stream:
  if jax.process_count() > 1:
    raise UserError(
      "loader.source: 'stream' runs in one process only; harvest a store first"
    )
  # Shards and chunks are a store's.
  names = 'tokens', 'dtype', 'centre', 'batch_contexts'
  store = {name: getattr(config.store, name) for name in names}
  source, identity, provenance = open_source(
    lm=dataclasses.asdict(config.lm),
    text=dataclasses.asdict(config.text),
    store=store | {'buffer_rows': config.loader.shuffle_rows},
    sites=sites,
    seed=config.seed,
    devices=jax.local_devices(),
    model=config.mesh.model,
    tick=preempted.check,
  )
  return Stream(
    source,
    identity=plain(identity),
    provenance=provenance,
    batch_size=config.train.batch_size,
    centre=config.store.centre,
    dtype=config.store.dtype,
    tick=preempted.check,
  )


def read_baseline(
  member: config_lib.MemberConfig, store: Store
) -> dict[str, np.ndarray]:
  """Parameters of the SAE that a member starts from.

  Raises:
    UserError: it is not a baseline of this site and width, or was trained on
      another language model.
  """
  assert member.baseline is not None
  field = f'saes: baseline of member {member.name!r}'
  try:
    sae = load(member.baseline, member=member.baseline_member)
  except UserError as e:
    raise UserError(f'{field}: {e}') from e
  wanted = {
    'architecture': 'relu',
    'site': member.site,
    'features': member.features,
    'width': store.sites[member.site].width,
  }
  for name, value in wanted.items():
    if sae.config[name] != value:
      raise UserError(
        f'{field}: its {name} is {sae.config[name]!r}, not {value!r}'
      )
  if sae.metadata['store_identity']['lm'] != store.identity['lm']:
    raise UserError(f'{field} was trained on another language model')
  return {k: np.asarray(v) for k, v in sae.params.items()}


def summarise(outcome: loop.Outcome, config: config_lib.Config) -> str:
  """The last line of a run."""
  values = outcome.values.values()
  parts = [f'step {outcome.step} of {config.train.steps}']
  if values:
    parts += [
      f'{len(values)} SAEs',
      f'{outcome.tokens_per_second:,.0f} tokens/s',
      *(
        f'{label} {min(found):.4g} to {max(found):.4g}'
        for label, key in (('loss', 'loss'), ('L0', 'l0'))
        for found in [[v[key] for v in values]]
      ),
    ]
  if outcome.stopped:
    parts.append(loop.tell_stopped(outcome.stopped))
  return ', '.join(parts)


def main(given: flags.FlagValues) -> int:
  processes.initialize(given)
  preempted = program.Preemption()
  with processes.together():
    config = config_lib.parse(program.read_config(given))
    mesh = make_mesh(config.mesh.data, config.mesh.model, config.mesh.sae)
    loader = open_loader(given.store, config, preempted)
  store = loader.store
  outcome = loop.train(
    store,
    loader,
    config.saes,
    config.train,
    mesh=mesh,
    seed=config.seed,
    workdir=given.workdir,
    metadata={
      'schema': checkpoints.SCHEMA,
      'config': plain(dataclasses.asdict(config)),
      'identity': config.identity(),
      'store': store.content_hash,
      'store_identity': store.identity,
      'store_provenance': store.provenance,
    },
    preempted=lambda: bool(preempted),
    baseline=lambda member: read_baseline(member, store),
    allowed=tuple(given['allow-config-change'].value or ()),
  )
  if jax.process_index() == 0:
    print(summarise(outcome, config))
  return 0 if outcome.finished else PREEMPTED


COMMAND = program.Command(define_flags, main)

if __name__ == '__main__':
  COMMAND.run()
