"""Checkpoints: exact resume, on other meshes too; and the door."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from gsae_jax.errors import Preempted, UserError
from gsae_jax.mesh import axis_sizes, make_mesh
from gsae_jax.restore import load
from gsae_jax.sae import TRAINED, VARIANTS, make_module
from gsae_jax.training import checkpoints as checkpoints_lib
from gsae_jax.training import loop
from gsae_jax.training.checkpoints import Checkpoints
from gsae_jax.training.groups import make_groups
from gsae_jax.training.records import read_metrics
from gsae_jax.training.state import fold_scale, key_data
from tests.support.training import (
  member,
  mesh_of,
  open_loader,
  params_at,
  settings,
  train,
)

MEMBERS = (
  member('g', l1=0.1),
  member('r', architecture='relu', features=96, site='mlp_out.0'),
)


@pytest.fixture(scope='module')
def whole(store, tmp_path_factory):
  """The workdir of a run that nothing interrupted, and its metrics' lines.

  No test may change it.
  """
  workdir = tmp_path_factory.mktemp('whole')
  return workdir, train(store, workdir, MEMBERS, settings())


@pytest.mark.integration
@pytest.mark.parametrize('mesh', ['1', '1x4'])
def test_resumed_equals_uninterrupted_to_the_bit(mesh, store, whole, tmp_path):
  mesh = mesh_of(model=4) if mesh == '1x4' else mesh_of()
  workdir, lines = whole
  if mesh.size > 1:
    workdir = tmp_path / 'whole'
    lines = train(store, workdir, MEMBERS, settings(), mesh=mesh)
  cut = train(
    store, tmp_path / 'cut', MEMBERS, settings(), mesh=mesh, stop_at=17
  )
  assert cut[-1]['step'] == 17
  assert train(store, tmp_path / 'cut', MEMBERS, settings(), mesh=mesh) == lines
  a = params_at(workdir, 30, store, MEMBERS, mesh)
  b = params_at(tmp_path / 'cut', 30, store, MEMBERS, mesh)
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert a['g'].step == 30


@pytest.mark.integration
def test_a_stream_that_is_left_behind_a_checkpoint_goes_on(
  store, whole, tmp_path
):
  # The signal comes while the batch of a step that was just saved is made.
  settings_, meta = settings(), {
    'schema': 4,
    'config': {'seed': 0, 'train': {'batch_size': settings().batch_size}},
    'identity': {'seed': 0},
    'store': store.content_hash,
    'store_identity': store.identity,
  }  # fmt: skip
  inner = open_loader(store, MEMBERS, settings_)

  class Left:
    bytes_read = 0

    def batches(self, sharding, *, start):
      for i, batch in enumerate(inner.batches(sharding, start=start)):
        if start + i == 10:
          raise Preempted
        yield batch

  outcome = loop.train(
    store, Left(), MEMBERS, settings_, mesh=mesh_of(), seed=0,
    workdir=str(tmp_path / 'cut'), metadata=meta, preempted=lambda: False,
  )  # fmt: skip
  assert not outcome.finished
  assert train(store, tmp_path / 'cut', MEMBERS, settings()) == whole[1]


@pytest.mark.integration
def test_a_crash_loses_only_what_came_after_the_checkpoint(
  store, whole, tmp_path
):
  # As kill -9 would: metrics past the last checkpoint, and half a line.
  train(store, tmp_path / 'cut', MEMBERS, settings(), stop_at=10)
  path = tmp_path / 'cut' / 'metrics.jsonl'
  line = json.dumps({'step': 13, 'tokens': 0, 'member': 'g', 'loss': 1.0})
  path.write_text(path.read_text() + line + '\n' + line[:20])
  assert train(store, tmp_path / 'cut', MEMBERS, settings()) == whole[1]


@pytest.mark.integration
def test_a_run_moved_between_meshes_is_the_one_that_stayed(
  store, tmp_path, float64
):
  one, s = mesh_of(), settings()
  meshes = one, make_mesh(4, 1), make_mesh(1, 4), make_mesh(2, 2)
  stayed = train(store, tmp_path / 'stayed', MEMBERS, s, mesh=one)
  for mesh, stop_at in zip(meshes, (7, 15, 23, None), strict=True):
    moved = train(
      store, tmp_path / 'moved', MEMBERS, s, stop_at=stop_at, mesh=mesh
    )
  for got, want in zip(moved, stayed, strict=True):
    assert got.keys() == want.keys() and got['step'] == want['step']
    for name in got.keys() & {'loss', 'l0', 'gamma'}:
      np.testing.assert_allclose(got[name], want[name], rtol=1e-9)
  a, b = (
    params_at(tmp_path / name, 30, store, MEMBERS, one)
    for name in ('stayed', 'moved')
  )
  for name, state in a.items():
    for k, v in state.params.items():
      np.testing.assert_allclose(b[name].params[k], v, atol=1e-12, rtol=0)
      assert np.abs(v).max() > 1e-3


@pytest.mark.integration
def test_a_run_begun_with_the_earlier_adam_says_so_and_continues(
  store, tmp_path, monkeypatch, capsys
):
  line = 'begun with an earlier form of Adam'
  train(store, tmp_path, MEMBERS, settings(), stop_at=10)
  train(store, tmp_path, MEMBERS, settings(), stop_at=12)
  assert line not in capsys.readouterr().err
  read = Checkpoints.metadata

  def earlier(self, step):
    return {k: v for k, v in read(self, step).items() if 'optimizer' not in k}

  monkeypatch.setattr(Checkpoints, 'metadata', earlier)
  train(store, tmp_path, MEMBERS, settings(), stop_at=14)
  assert capsys.readouterr().err.count(line) == 1
  monkeypatch.undo()
  assert train(store, tmp_path, MEMBERS, settings())[-1]['step'] == 30
  assert line not in capsys.readouterr().err


@pytest.mark.integration
def test_saved_parameters_are_those_of_that_step(store, tmp_path):
  # An asynchronous save must not see what the next, donating step wrote.
  train(store, tmp_path / 'all', MEMBERS, settings(checkpoint_every=5))
  train(store, tmp_path / 'one', MEMBERS, settings(), stop_at=5)
  mesh = mesh_of()
  a = params_at(tmp_path / 'all', 5, store, MEMBERS, mesh)
  b = params_at(tmp_path / 'one', 5, store, MEMBERS, mesh)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.integration
def test_names_schema_and_steps_on_disk(store, tmp_path):
  train(store, tmp_path, MEMBERS, settings(checkpoints_kept=2))
  with Checkpoints(str(tmp_path), read_only=True) as saved:
    assert saved.steps() == [20, 30]
    metadata = saved.metadata(30)
  assert [m['name'] for m in metadata['members']] == ['g', 'r']
  assert metadata['store'] == store.content_hash
  names = (tmp_path / 'checkpoints/30/state/_METADATA').read_text()
  for name in ('params', 'W_dec', 'nu', 'steps_since_fired', 'rng', 'step'):
    assert f"'{name}'" in names or f'"{name}"' in names


@pytest.mark.integration
def test_saved_weights_take_raw_activations(store, tmp_path):
  train(store, tmp_path, MEMBERS, settings(steps=60))
  shapes = {'W_enc': [16, 96], 'b_enc': [96], 'W_dec': [96, 16], 'b_dec': [16]}
  with Checkpoints(str(tmp_path), read_only=True) as saved:
    p = saved.restore_params(60, {'r': shapes})['r']
  x = store.array('mlp_out.0/activations')[:].read().result()
  f = np.maximum((x - p['b_dec']) @ p['W_enc'] + p['b_enc'], 0)
  error = ((f @ p['W_dec'] + p['b_dec'] - x) ** 2).sum(1).mean()
  variance = ((x - x.mean(0)) ** 2).sum(1).mean()
  assert error < 0.3 * variance
  np.testing.assert_allclose(np.linalg.norm(p['W_dec'], axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize('architecture', TRAINED)
def test_folding_the_scale_changes_units_and_nothing_else(architecture, rng):
  about = {'architecture': architecture, 'width': 16, 'features': 40}
  module = make_module(VARIANTS | about)
  x = rng.normal(size=(50, 16)).astype(np.float32)
  params = module.init(jax.random.key(0), x)['params']
  noise = {k: rng.normal(size=v.shape) for k, v in params.items()}
  params = {k: np.float32(v + noise[k]) for k, v in params.items()}
  run = lambda p, x: module.apply({'params': p}, x)
  scaled = run(params, 0.05 * x)
  raw = run(fold_scale(params, 0.05), x)
  for name in ('f', 'x_hat'):
    np.testing.assert_allclose(
      raw[name] * 0.05, scaled[name], rtol=1e-4, atol=1e-5
    )


@pytest.mark.integration
def test_another_config_or_store_is_refused(store, tmp_path):
  train(store, tmp_path, MEMBERS, settings(), stop_at=10)
  before = sorted(p.name for p in (tmp_path / 'checkpoints').iterdir())
  with pytest.raises(UserError, match='another config .*seed is'):
    train(store, tmp_path, MEMBERS, settings(), meta={'identity': {'seed': 1}})
  with pytest.raises(UserError, match='another store'):
    train(store, tmp_path, MEMBERS, settings(), meta={'store': '0' * 64})
  assert before == sorted(p.name for p in (tmp_path / 'checkpoints').iterdir())


@pytest.mark.integration
def test_allowed_changes_go_on_and_are_told(store, tmp_path):
  identity = {'seed': 0, 'train': {'steps': 30, 'clip_norm': None}}
  run = tmp_path / 'run'
  train(store, run, MEMBERS, settings(), meta={'identity': identity})
  longer = {'seed': 0, 'train': {'steps': 40, 'clip_norm': 1.0}}
  more = settings(steps=40)
  with pytest.raises(
    UserError, match='train.clip_norm is None .*config-change=train.clip_norm'
  ):
    train(store, run, MEMBERS, more, meta={'identity': longer})
  with pytest.raises(UserError, match='train.steps is 30 there and 40 here'):
    train(
      store, run, MEMBERS, more, meta={'identity': longer},
      allowed=('train.clip_norm',),
    )  # fmt: skip
  with pytest.raises(
    UserError, match="no field 'train.step'; did you mean 'tr"
  ):
    train(
      store, run, MEMBERS, more, meta={'identity': longer},
      allowed=('train.step',),
    )  # fmt: skip
  # The same command may be given again, before and after it got anywhere.
  for stop_at in (30, None, None):
    lines = train(
      store, run, MEMBERS, more, meta={'identity': longer}, allowed=('train',),
      stop_at=stop_at,
    )  # fmt: skip
  assert lines[-1]['step'] == 40
  changes = [
    r['config_change']
    for r in read_metrics(run / 'metrics.jsonl')
    if 'config_change' in r
  ]
  assert changes == [
    'train.clip_norm is None there and 1.0 here',
    'train.steps is 30 there and 40 here',
  ]
  # Now it is the run's own.
  train(store, run, MEMBERS, more, meta={'identity': longer})
  with pytest.raises(UserError, match='train.steps: .* is at step 40 already'):
    train(store, run, MEMBERS, settings(), meta={'identity': longer})


@pytest.mark.integration
def test_a_change_of_shape_cannot_be_allowed(store, tmp_path):
  train(store, tmp_path, MEMBERS, settings(), stop_at=10)
  for other in (
    (MEMBERS[0], member('r', architecture='relu', features=64)),
    (MEMBERS[0], member('r', features=96, site='mlp_out.0')),
    (*MEMBERS, member('new')),
  ):
    with pytest.raises(UserError, match='the checkpoint has no member'):
      train(store, tmp_path, other, settings(), allowed=('seed',))


@pytest.mark.integration
def test_what_tokens_are_counted_by_cannot_be_allowed(store, tmp_path):
  meta = lambda size: {'identity': {'train': {'batch_size': size}}}
  train(store, tmp_path, MEMBERS, settings(), stop_at=10, meta=meta(128))
  with pytest.raises(
    UserError, match='batch_size is 128 there and 64 here.*can'
  ):
    train(
      store, tmp_path, MEMBERS, settings(batch_size=64), meta=meta(64),
      allowed=('train',),
    )  # fmt: skip


@pytest.mark.integration
def test_a_member_may_be_left_out_by_permission(store, whole, tmp_path):
  meta = lambda *names: {'identity': {'saes': dict.fromkeys(names, {'l1': 1})}}
  run = tmp_path / 'run'
  train(store, run, MEMBERS, settings(), stop_at=10, meta=meta('g', 'r'))
  with pytest.raises(UserError, match='saes.r is .* there and None here'):
    train(store, run, MEMBERS[:1], settings(), meta=meta('g'))
  lines = train(
    store, run, MEMBERS[:1], settings(), meta=meta('g'), allowed=('saes.r',)
  )
  assert [r for r in lines if r['member'] == 'g'] == [
    r for r in whole[1] if r['member'] == 'g'
  ]
  assert max(r['step'] for r in lines if r['member'] == 'r') == 10


@pytest.mark.integration
def test_another_store_by_permission_brings_its_own_scale(
  store, tmp_path, tmp_path_factory
):
  # The new one's activations are twice as long: biases for scaled ones are
  # made anew from those for raw ones.
  train(store, tmp_path, MEMBERS, settings(), stop_at=10)
  site = store.sites['resid_post.0']
  longer = dataclasses.replace(
    store,
    sites=store.sites
    | {
      'resid_post.0': dataclasses.replace(
        site, mean_squared_norm=4 * site.mean_squared_norm
      )
    },
  )
  a = params_at(tmp_path, 10, store, MEMBERS, mesh_of())['g'].params
  b = params_at(tmp_path, 10, longer, MEMBERS, mesh_of())['g'].params
  np.testing.assert_allclose(b['b_dec'], a['b_dec'] / 2, rtol=1e-6)
  np.testing.assert_array_equal(b['W_gate'], a['W_gate'])


@pytest.mark.integration
def test_the_latest_and_every_so_many_checkpoints_are_kept(store, tmp_path):
  s = settings(
    checkpoint_every=4, checkpoints_kept=2, checkpoints_kept_every=12
  )
  train(store, tmp_path, MEMBERS, s)
  with Checkpoints(str(tmp_path), read_only=True) as saved:
    assert saved.steps() == [0, 12, 24, 28, 30]


@pytest.mark.integration
def test_unknown_schema_is_refused(store, tmp_path):
  train(store, tmp_path, MEMBERS, settings(), meta={'schema': 9})
  with Checkpoints(str(tmp_path), read_only=True) as saved:
    with pytest.raises(UserError, match='has schema 9, and this version reads'):
      saved.metadata(30)


def test_object_storage_that_orbax_cannot_write_is_refused():
  with pytest.raises(UserError, match='checkpoints cannot be on s3://'):
    Checkpoints('s3://bucket/run')


@pytest.mark.integration
def test_a_member_that_diverges_is_stopped_and_the_others_go_on(
  store, tmp_path, capsys
):
  wild = member('w', learning_rate=1e30)
  s = settings(checkpoint_every=5, checkpoints_kept=1, log_every=15)
  lines = train(store, tmp_path / 'run', (wild, *MEMBERS), s)
  (event,) = [e for e in lines if 'stopped' in e]
  assert "member 'w' diverged at step 5: its weights" in capsys.readouterr().err
  # Its weights are looked at before they are saved; the last sound ones stay.
  assert event == {
    'step': 5, 'tokens': 640, 'member': 'w', 'last_checkpoint': 0,
    'stopped': 'its weights or its loss are not all finite',
  }  # fmt: skip
  assert not any(e['member'] == 'w' for e in lines if e['step'] > 5)
  alone = train(store, tmp_path / 'alone', MEMBERS, s)
  assert [e for e in lines if e['member'] != 'w'] == alone
  with Checkpoints(str(tmp_path / 'run'), read_only=True) as saved:
    assert saved.steps() == [0, 30]
    metadata = saved.metadata(30)
  assert [m['name'] for m in metadata['members']] == ['g', 'r']
  assert metadata['stopped']['w']['last_checkpoint'] == 0
  with pytest.raises(
    UserError, match="'w' was stopped at step 5 .*load step=0"
  ):
    load(str(tmp_path / 'run'), member='w')
  assert load(str(tmp_path / 'run'), member='w', step=0).config['name'] == 'w'


@pytest.mark.slow
def test_a_run_without_a_member_goes_on_without_it(store, tmp_path):
  members = (member('w', learning_rate=1e30), *MEMBERS)
  for stack in ('looped', 'stacked'):
    s = settings(checkpoint_every=5, log_every=2, members=stack)
    whole = train(store, tmp_path / f'{stack}1', members, s)
    train(store, tmp_path / f'{stack}2', members, s, stop_at=17)
    assert train(store, tmp_path / f'{stack}2', members, s) == whole
    (event,) = [e for e in whole if 'stopped' in e]
    assert event['stopped'] == 'its loss is nan' and event['step'] == 2


@pytest.mark.integration
def test_weights_that_are_finite_with_a_loss_that_is_not_are_not_saved(
  store, tmp_path
):
  # r_mag beyond what exp can say.
  for rate in (1e4, 1e12):
    wild = member('w', learning_rate=rate)
    s = settings(steps=2, checkpoint_every=1, warmup_steps=0)
    folder = tmp_path / f'{rate:g}'
    lines = train(store, folder, (wild, *MEMBERS), s)
    (event,) = [e for e in lines if 'stopped' in e]
    assert event['step'] == 1 and event['last_checkpoint'] == 0
    w = load(str(folder), member='w', step=0)
    assert np.isfinite(w.params['W_dec']).all()


@pytest.mark.integration
def test_a_stopped_member_cannot_be_changed_and_go_on(store, tmp_path):
  members = (member('w', learning_rate=1e30), *MEMBERS)
  meta = lambda rate: {'identity': {'saes': {'w': {'learning_rate': rate}}}}
  train(store, tmp_path, members, settings(), meta=meta(1e30), stop_at=20)
  slower = (member('w', learning_rate=1e-3), *MEMBERS)
  with pytest.raises(
    UserError, match="member 'w' was stopped at step 2 and doe"
  ):
    train(
      store, tmp_path, slower, settings(), meta=meta(1e-3),
      allowed=('saes.w.learning_rate',),
    )  # fmt: skip


@pytest.mark.integration
def test_another_seed_by_permission_is_the_one_that_is_recorded(
  store, tmp_path
):
  train(store, tmp_path, (member(seed=0),), settings(), stop_at=10)
  other = {'identity': {'seed': 1}}
  train(
    store, tmp_path, (member(seed=1),), settings(), meta=other,
    allowed=('seed',),
  )  # fmt: skip
  state = params_at(tmp_path, 30, store, (member(seed=1),), mesh_of())['a']
  np.testing.assert_array_equal(state.rng, key_data(1))
  assert load(str(tmp_path)).config['seed'] == 1


@pytest.mark.integration
def test_what_followed_the_run_is_recorded_as_the_runs(store, tmp_path):
  one, two = member(), member('b', learning_rate=1e-3, loss_scale='mean')
  train(store, tmp_path, (one, two), settings(steps=2))
  a, b = (load(str(tmp_path), member=name).config for name in 'ab')
  assert (a['learning_rate'], a['loss_scale']) == (np.float32(3e-3), 'sum')
  assert (b['learning_rate'], b['loss_scale']) == (np.float32(1e-3), 'mean')


@pytest.mark.integration
def test_a_checkpoint_that_cannot_be_written_is_one_line(
  store, tmp_path, monkeypatch
):
  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  train(store, tmp_path, MEMBERS, settings(), stop_at=10)
  monkeypatch.setattr('orbax.checkpoint.CheckpointManager.save', full)
  with pytest.raises(UserError, match='cannot save .*No space left .*goes on'):
    train(store, tmp_path, MEMBERS, settings())


@pytest.mark.integration
def test_when_every_member_diverges_the_run_fails(store, tmp_path):
  wild = settings(learning_rate=1e30, checkpoint_every=5, log_every=15)
  with pytest.raises(
    UserError, match="'r' diverged at step 5: .*checkpoint is of step 0; no mem"
  ):
    train(store, tmp_path, MEMBERS, wild)
  with Checkpoints(str(tmp_path), read_only=True) as saved:
    assert saved.steps() == [0]


@pytest.mark.integration
def test_a_damaged_checkpoint_is_named(store, whole, tmp_path):
  shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
  for path in (tmp_path / 'checkpoints' / '30').rglob('*'):
    if path.is_file() and 'state' in path.parts and path.stat().st_size > 500:
      path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(
    UserError, match='checkpoints/30 cannot be read .*; delete'
  ):
    train(store, tmp_path, MEMBERS, settings(steps=30))


def test_sizes_that_the_mesh_does_not_divide(store):
  with pytest.raises(UserError, match='66 features, not divisible by mesh.mod'):
    make_groups((member(features=66),), settings(), store, make_mesh(1, 4), 0)
  with pytest.raises(UserError, match='130 is not divisible by mesh.data, 4'):
    make_groups(
      (member(),), settings(batch_size=130), store, make_mesh(4, 1), 0
    )
  with pytest.raises(UserError, match="trains on 'mlp_out.9'"):
    make_groups(
      (member(site='mlp_out.9'),), settings(), store, make_mesh(4, 1), 0
    )
  with pytest.raises(UserError, match='data=3 x model=1 does not cover 4'):
    make_mesh(3, 1)
  for sizes in ((-1, -1, 1), (-1, 32, 1), (2, 4, 1)):
    with pytest.raises(UserError, match='does not cover 16'):
      axis_sizes(*sizes, 16)
  assert axis_sizes(-1, 4, 1, 16) == {'sae': 1, 'data': 4, 'model': 4}
  assert axis_sizes(4, -1, 2, 16) == {'sae': 2, 'data': 4, 'model': 2}


def test_parameters_are_read_where_jax_has_no_cpu(monkeypatch):
  devices = jax.local_devices()

  def local_devices(backend=None):
    if backend:
      raise RuntimeError('Unknown backend cpu')
    return devices[2:]

  assert checkpoints_lib._host() == devices[0]
  monkeypatch.setattr(jax, 'local_devices', local_devices)
  assert checkpoints_lib._host() == devices[2]
