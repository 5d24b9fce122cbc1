"""A small store of planted sparse codes, and runs on it that are quick and real."""

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.activations.loader import Loader
from gsae_jax.activations.store import open_store
from gsae_jax.activations.writer import StoreWriter
from gsae_jax.config import MemberConfig, TrainConfig
from gsae_jax.training import loop, optimizer
from gsae_jax.training.checkpoints import Checkpoints
from gsae_jax.training.groups import make_groups
from gsae_jax.training.run import Run
from gsae_jax.training.state import turn
from tests.support.commands import metrics_of

WIDTH, ROWS = 16, 4096


def write_store(path, rows=ROWS, seed=0, dtype='float32'):
  rng = np.random.default_rng(seed)
  directions = rng.normal(size=(48, WIDTH))
  directions /= np.linalg.norm(directions, axis=1, keepdims=True)
  sites = 'resid_post.0', 'mlp_out.0'

  def make(shard):
    draw = np.random.default_rng((seed, shard))
    n = min(1024, rows - shard * 1024)
    codes = draw.exponential(size=(n, 48)) * (draw.random((n, 48)) < 0.08)
    x = (codes @ directions * 5 + 1).astype(np.float32)
    return {
      'token_ids': np.arange(n, dtype=np.int32),
      'positions': np.zeros(n, np.int32),
      'context_ids': np.zeros(n, np.int32),
      'document_ids': np.zeros(n, np.uint64),
      'special': np.zeros(n, bool),
      'resid_post.0': x.astype(ts.dtype(dtype).numpy_dtype),
      'mlp_out.0': (2 * x).astype(ts.dtype(dtype).numpy_dtype),
    }

  with StoreWriter(
    str(path),
    identity={'seed': seed},
    provenance={},
    widths=dict.fromkeys(sites, WIDTH),
    rows=rows,
    shard_rows=1024,
    chunk_rows=16,
    buffer_rows=1024,
    dtype=dtype,
    make_encodings=lambda: dict.fromkeys(sites),
  ) as writer:
    for shard in writer.missing_buffers():
      writer.put(shard, make(shard))
    writer.flush()
    writer.finish()
  return open_store(str(path))


def open_loader(store, members, train, *, seed=0):
  """What the train command opens, without mixing."""
  return Loader(
    store,
    tuple(dict.fromkeys(m.site for m in members)),
    batch_size=train.batch_size,
    seed=seed,
    unit='chunk',
    shuffle_rows=train.batch_size,
  )


def scales_in_float64(count):
  """Returns what `optimizer.scales` does, in float64.

  The last bits of the float32 ones differ between programs and processors.
  """
  since = count % optimizer.REBASE
  power = jnp.float64(optimizer.DECAY) ** since
  return optimizer.Scales(
    keep=jnp.where(since == 0, optimizer.DECAY**optimizer.REBASE, 1.0),
    gain=(1 - optimizer.DECAY) / power,
    correct=power / (1 - jnp.float64(optimizer.DECAY) ** count),
  )


# What all members of most tests have in common, so that they share programs.
def settings(**changes) -> TrainConfig:
  values = {
    'steps': 30,
    'batch_size': 128,
    'learning_rate': 3e-3,
    'warmup_steps': 5,
    'l1_warmup_steps': 5,
    'decay_steps': 0,
    'resample_steps': (),
    'resample_rows': 512,
    'dead_after': 10,
    'encoder_scale': 0.5,
    'normalize': 'mean_squared_norm',
    'loss_scale': 'sum',
    'checkpoint_every': 10,
    'clip_norm': None,
    'precision': 'float32',
    'members': 'auto',
    'sparse': 'auto',
    'microbatches': 1,
    'checkpoints_kept': None,
    'checkpoints_kept_every': None,
    'log_every': 1,
    'histogram_every': 10,
    'writers': (),
  }
  return TrainConfig(**values | changes)


def member(name='a', **changes) -> MemberConfig:
  values = {
    'architecture': 'gated',
    'site': 'resid_post.0',
    'features': 64,
    'l1': 0.1,
  }
  return MemberConfig(name=name, **values | changes)


# Gates that are shut by a large coefficient and rate, and then resampled.
DYING = {
  'steps': 24, 'dead_after': 3, 'learning_rate': 0.05, 'resample_steps': (20,)
}  # fmt: skip


def mesh_of(sae=1, data=1, model=1):
  """A mesh over the first devices."""
  devices = jax.devices()[: sae * data * model]
  auto = (jax.sharding.AxisType.Auto,) * 3
  return jax.make_mesh(
    (sae, data, model),
    ('sae', 'data', 'model'),
    axis_types=auto,
    devices=devices,
  )


def start(store, members, train, *, mesh=None, seed=0, baseline=None):
  """The members of a run, at step 0."""
  mesh = mesh or mesh_of()
  run = Run(make_groups(members, train, store, mesh, seed), store)
  run.start(baseline)
  return run


def states(run):
  """Everything that training carries, by member; turned to the paper's shapes."""
  return {k: turned(v) for g in run.groups for k, v in g.states().items()}


def turned(state):
  """A state with parameters and moments of the shapes that are saved, and back."""
  moments = state.opt_state._replace(nu=turn(state.opt_state.nu))
  return state._replace(params=turn(state.params), opt_state=moments)


def run_steps(
  store, members, train, *, mesh=None, seed=0, loader=None, **kwargs
):
  """Trains in memory; returns losses and states by member, and the run."""
  mesh = mesh or mesh_of()
  run = start(store, members, train, mesh=mesh, seed=seed, **kwargs)
  loader = loader or open_loader(store, members, train, seed=seed)
  batches = loader.batches(NamedSharding(mesh, P('data')), start=0)
  losses = {m.name: [] for m in members}
  for _ in range(train.steps):
    for names, metrics in run.step(next(batches)).items():
      for name, loss in zip(names, np.atleast_1d(metrics['loss']), strict=True):
        losses[name].append(float(loss))
  return losses, states(run), run


def train(
  store,
  workdir,
  members,
  train,
  *,
  stop_at=None,
  mesh=None,
  meta=None,
  **kwargs,
):
  """Runs the real loop, on one device by default; returns its metrics' lines."""
  loader = open_loader(store, members, train)
  at = [-1]
  inner = loader.batches

  def batches(sharding, *, start):
    for at[0], batch in enumerate(inner(sharding, start=start), start + 1):
      yield batch

  loader.batches = batches
  if stop_at is not None:
    steps = Checkpoints(str(workdir)).steps()
    at[0] = steps[-1] if steps else 0
  metadata = {
    'schema': 4,
    'config': {'seed': 0, 'train': {'batch_size': train.batch_size}},
    'identity': {'seed': 0},
    'store': store.content_hash,
    'store_identity': store.identity,
  }
  outcome = loop.train(
    store,
    loader,
    members,
    train,
    mesh=mesh or mesh_of(),
    seed=0,
    workdir=str(workdir),
    metadata=metadata | (meta or {}),
    preempted=lambda: stop_at is not None and at[0] >= stop_at,
    **kwargs,
  )
  assert outcome.finished == (stop_at is None)
  return metrics_of(workdir)


def params_at(workdir, step, store, members, mesh):
  """Everything a checkpoint holds, as host arrays by path."""
  run = Run(make_groups(members, settings(), store, mesh, 0), store)
  with Checkpoints(str(workdir), read_only=True) as saved:
    run.restore(saved, step)
  return jax.tree.map(np.asarray, jax.device_get(states(run)))
