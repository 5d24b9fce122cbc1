"""One training step as `gsae_jax.train` takes it."""

import dataclasses

import jax
import ml_collections
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import synthetic
from benchmarks.settings import Settings
from benchmarks.turns import Side
from experiments import quickstart
from gsae_jax import config as config_lib
from gsae_jax.activations.store import Site, Store
from gsae_jax.mesh import make_mesh
from gsae_jax.training import state as state_lib
from gsae_jax.training.features import block_size
from gsae_jax.training.groups import Group, make_groups
from gsae_jax.training.members import make_recipe
from gsae_jax.training.programs import compile_step, ways

SITE = 'mlp_out.0'
_SPARSE = {'dense': 'never', 'sparse': 'always'}


def _config(name: str, s: Settings) -> config_lib.Config:
  """The quickstart's, with one SAE, at a constant learning rate."""
  c = ml_collections.ConfigDict(quickstart.get_config().to_dict())
  c.train.update(
    batch_size=s.batch,
    learning_rate=s.learning_rate,
    warmup_steps=0,
    l1_warmup_steps=0,
    decay_steps=0,
    members='looped',
    precision='bfloat16' if s.device == 'gpu' else 'float32',
  )
  c.train.normalize = None
  fields = {f.name for f in dataclasses.fields(config_lib.TrainConfig)}
  if 'sparse' in fields:
    c.train.sparse = _SPARSE[name]
  elif name == 'sparse':
    raise SystemExit('error: this version has no train.sparse to set')
  c.saes = (
    {
      'name': name,
      'architecture': 'gated',
      'site': SITE,
      'features': s.features,
      'l1': s.l1,
    },
  )
  return config_lib.parse(c)


def _store(x_ND: np.ndarray) -> Store:
  """What training asks of one; nothing is on a disk."""
  norm_N = np.linalg.norm(x_ND.astype(np.float64), axis=1)
  site = Site(
    width=x_ND.shape[1],
    mean_D=x_ND.mean(0, dtype=np.float64),
    mean_norm=float(norm_N.mean()),
    mean_squared_norm=float(np.mean(norm_N**2)),
    encoding=None,
  )
  return Store(
    path='',
    identity={},
    provenance={},
    content_hash='',
    rows=len(x_ND),
    shard_rows=len(x_ND),
    chunk_rows=len(x_ND),
    dtype='float32',
    sites={SITE: site},
  )


def _fill(group: Group, params: dict[str, np.ndarray]) -> None:
  (member,) = group.members
  state = group.fresh(member, lambda member: {})
  placed = {
    k: jax.device_put(v, state.params[k].sharding)
    for k, v in state_lib.turn(params).items()
  }
  group.put({member.name: state._replace(params=placed)})


def make_step(name: str, s: Settings, folder: str) -> Side:
  """Builds 'dense' or 'sparse'; takes the first steps."""
  x_ND, params = synthetic.read(folder)
  settings = _config(name, s)
  mesh = make_mesh(1, 1)
  (group,) = make_groups(
    settings.saes, settings.train, _store(x_ND), mesh, settings.seed
  )
  _fill(group, params)
  del params
  rows = NamedSharding(mesh, P('data'))
  batches = [
    {SITE: jax.device_put(x, rows)} for x in np.split(x_ND, synthetic.BATCHES)
  ]
  first = jax.device_get(group.step(batches[0]))
  done, metrics = [1], [first]

  def run():
    for _ in range(s.steps):
      metrics[0] = group.step(batches[done[0] % len(batches)])
      done[0] += 1
    jax.block_until_ready((group.state, metrics[0]))

  def end():
    device_peak = _device_peak(mesh)
    params = jax.device_get(state_lib.turn(group.state.params))
    told = {
      'l0': synthetic.open_gates(params, x_ND),
      'device_peak_bytes': device_peak,
      'metrics': {k: float(v) for k, v in metrics[0].items()},
    }
    if name == 'dense':
      told['flops'] = count(settings, group, batches[0], mesh)
    return told

  run()
  device = mesh.devices.flat[0].device_kind
  return Side(run, {'first_loss': float(first['loss']), 'device': device}, end)


def count(settings, group: Group, batch, mesh) -> float:
  """Operations of a step that takes all features, by the compiler's analysis.

  It counts a loop once, so what takes some features at a time is asked for them.
  """
  (way,) = ways(settings.train, group.module, mesh, stacked=False)
  F = group.module.features
  size = block_size(F) if way == 'blocked' else F
  module = group.module.clone(features=size)
  step = compile_step(
    module, make_recipe(settings.train), mesh, stacked=False, way=way
  )
  shapes = state_lib.member_shapes(module)
  hyper = group.members[0].hyper
  lowered = step.lower(shapes, tuple(batch.values()), hyper, which=None)
  return lowered.compile().cost_analysis()['flops'] * (F / size)


def _device_peak(mesh) -> int | None:
  stats = mesh.devices.flat[0].memory_stats()  # None on CPUs.
  return stats and stats['peak_bytes_in_use']
