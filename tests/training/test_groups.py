"""Several SAEs by one program: each as if alone, on any mesh, and what is sent."""

import functools
import re
import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax.errors import UserError
from gsae_jax.sae.gated import GatedSAE
from gsae_jax.training import state as state_lib
from gsae_jax.training.groups import make_groups
from gsae_jax.training.members import make_recipe
from gsae_jax.training.programs import compile_step, is_stacked
from gsae_jax.training.step import Hyperparameters
from tests.support.training import (
  DYING,
  member,
  mesh_of,
  params_at,
  run_steps,
  settings,
  start,
  train,
)

SWEEP = tuple(
  member(f'm{i}', l1=0.05 * 2**i, seed=i, learning_rate=2e-3 * (i + 1))
  for i in range(4)
)


@pytest.fixture(scope='module')
def alone(store):
  """Losses and state of a member that is trained alone, each once."""

  @functools.cache
  def run(one, steps):
    losses, found, _ = run_steps(store, (one,), settings(steps=steps))
    return losses[one.name], found[one.name]

  return run


def close(ours, theirs, tolerance=1e-12):
  """Every array of two members' states."""
  for name in theirs:
    a, b = (jax.device_get(states[name]) for states in (ours, theirs))
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(
        np.float64(x), np.float64(y), atol=tolerance
      ),
      a,
      b,
    )


@pytest.mark.integration
@pytest.mark.parametrize(
  'mesh',
  [
    {},
    pytest.param({'sae': 4}, marks=pytest.mark.slow),
    {'sae': 2, 'model': 2},
    {'sae': 2, 'data': 2},
  ],
)
def test_a_stacked_member_is_the_member_alone(mesh, store, alone, float64):
  mesh = mesh_of(**mesh)
  losses, got, run = run_steps(
    store, SWEEP, settings(steps=20, members='stacked'), mesh=mesh
  )
  assert len(run.groups) == 1
  for one in SWEEP:
    own, state = alone(one, 20)
    np.testing.assert_allclose(losses[one.name], own, rtol=1e-9)
    close(got, {one.name: state})
  W_dec = run.groups[0].state.params['W_dec']
  sae, model = mesh.shape['sae'], mesh.shape['model']
  assert W_dec.sharding.shard_shape(W_dec.shape) == (4 // sae, 64 // model, 16)


@pytest.mark.integration
def test_members_of_several_sites_are_one_stack(store, alone, float64):
  members = (
    member('a'),
    member('b', site='mlp_out.0', l1=0.2),
    member('c', seed=3),
    member('d', site='mlp_out.0'),
  )
  s = settings(steps=12, members='stacked')
  losses, _, run = run_steps(store, members, s, mesh=mesh_of(sae=2))
  assert [g.names for g in run.groups] == [('a', 'b', 'c', 'd')]
  for one in members:
    np.testing.assert_allclose(losses[one.name], alone(one, 12)[0], rtol=1e-9)
  assert losses['a'] != losses['b']


def test_groups_are_of_equal_shape_only(store):
  members = (
    member('a'), member('b', features=32), member('c', encoder='untied'),
    member('d', l1=0.3, loss_scale='mean'), member('e', architecture='relu'),
  )  # fmt: skip
  groups = make_groups(
    members, settings(members='stacked'), store, mesh_of(), 0
  )
  assert [g.names for g in groups] == [('a', 'd'), ('b',), ('c',), ('e',)]
  # On CPU it is faster to go through them; what suits an accelerator is auto.
  groups = make_groups(members, settings(), store, mesh_of(), 0)
  assert [g.names for g in groups] == [('a',), ('d',), ('b',), ('c',), ('e',)]
  with pytest.raises(
    UserError, match='3 members of the shape of .*mesh.sae, 2'
  ):
    make_groups(SWEEP[:3], settings(), store, mesh_of(sae=2), 0)


def test_small_members_are_a_stack_on_accelerators():
  def stacked(platform, features, **sizes):
    mesh = types.SimpleNamespace(
      shape={'sae': 1} | sizes,
      devices=np.array([types.SimpleNamespace(platform=platform)]),
    )
    module = GatedSAE(width=512, features=features)
    return is_stacked(settings(members='auto', batch_size=4096), module, mesh)

  assert stacked('gpu', 4096) and not stacked('gpu', 2**17)
  assert not stacked('cpu', 4096) and stacked('cpu', 4096, sae=2)


@pytest.mark.integration
def test_members_of_a_stack_are_born_spread(store):
  # Or starting would need the memory of whole members on every device.
  (group,) = make_groups(
    SWEEP, settings(members='stacked'), store, mesh_of(sae=2, model=2), 0
  )
  W_dec = group.fresh(group.members[0], None).params['W_dec']
  assert W_dec.sharding.shard_shape(W_dec.shape) == (16, 16)


@pytest.mark.slow
def test_a_stack_goes_on_as_members_on_their_own_and_back(
  store, tmp_path, float64
):
  meshes = mesh_of(sae=2, model=2), mesh_of(data=4), mesh_of(sae=4)
  modes = 'stacked', 'looped', 'auto'
  whole = train(store, tmp_path / 'whole', SWEEP, settings(), mesh=mesh_of())
  stops = 11, 22, None
  for mode, mesh, stop_at in zip(modes, meshes, stops, strict=True):
    moved = train(
      store, tmp_path / 'moved', SWEEP, settings(members=mode), mesh=mesh,
      stop_at=stop_at,
    )  # fmt: skip
  assert len(moved) == len(whole)
  a, b = (
    params_at(tmp_path / name, 30, store, SWEEP, mesh_of())
    for name in ('whole', 'moved')
  )
  close(a, b)


@pytest.mark.integration
def test_a_stack_is_resampled_like_its_members(store, tmp_path, float64):
  # A feature that one gate keeps alive would be one more or less.
  members = tuple(member(f'm{i}', l1=20.0 + 5 * i) for i in range(2))
  found = {}
  for mode, mesh in (('looped', {}), ('stacked', {'sae': 2, 'model': 2})):
    lines = train(
      store, tmp_path / mode, members, settings(members=mode, **DYING),
      mesh=mesh_of(**mesh),
    )  # fmt: skip
    found[mode] = {
      r['member']: r['resampled'] for r in lines if 'resampled' in r
    }
  assert found['looped'] == found['stacked'] and all(found['looped'].values())


# Of a compiled step: collectives, as (kind, bytes of what each device gets).
COLLECTIVE = re.compile(
  r'= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|'
  r'reduce-scatter)(?:-start)?\('
)
BYTES = {'f32': 4, 's32': 4, 'pred': 1, 'bf16': 2}


def collectives(program):
  found = []
  for shapes, kind in COLLECTIVE.findall(program.as_text()):
    total = 0
    for dtype, sizes in re.findall(r'(\w+)\[([\d,]*)\]', shapes):
      total += BYTES[dtype] * np.prod([int(n) for n in sizes.split(',') if n])
    found.append((kind, int(total)))
  return found


def compiled(mesh, *, B, D, F, members=0, way='dense'):
  """The step's program."""
  module = GatedSAE(width=D, features=F, turned=True)
  step = compile_step(
    module, make_recipe(settings()), mesh, stacked=bool(members), way=way
  )
  front = (members,) if members else ()
  shapes = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct((*front, *a.shape), a.dtype),
    state_lib.member_shapes(module),
  )
  layout = 'stacked' if members else 'alone'
  state = state_lib.place(
    shapes, state_lib.shardings(mesh, shapes, layout=layout)
  )
  at = lambda shape, *spec: jax.ShapeDtypeStruct(
    shape, np.float32, sharding=NamedSharding(mesh, P(*spec))
  )
  hyper = Hyperparameters(*[at(front, *(('sae',) if members else ()))] * 4)
  x = (at((B, D), 'data'),)
  return step.lower(state, x, hyper, which=None).compile()


@pytest.mark.integration
@pytest.mark.parametrize('way', ['dense', 'blocked', 'sparse'])
def test_features_over_devices_send_two_reconstructions_and_no_weights(way):
  B, D = 256, 128
  found = collectives(compiled(mesh_of(model=4), B=B, D=D, F=512, way=way))
  both = 2 * B * D * 4
  # One all-reduce of both; the rest is b_dec's gradient and scalars.
  assert max(size for _, size in found) == both
  assert {kind for kind, _ in found} == {'all-reduce'}
  assert sum(size for _, size in found) <= 1.01 * both


def test_rows_over_devices_send_gradients_once():
  D, F = 64, 1024
  found = collectives(compiled(mesh_of(data=4), B=512, D=D, F=F))
  assert {kind for kind, _ in found} == {'all-reduce'}
  assert sum(size for _, size in found) <= 1.05 * 2 * D * F * 4


@pytest.mark.integration
def test_saes_over_devices_send_nothing():
  assert not collectives(
    compiled(mesh_of(sae=4), B=256, D=64, F=512, members=4)
  )
  # With features split too, each pair of devices sends what two would.
  mesh = mesh_of(sae=2, model=2)
  found = collectives(compiled(mesh, B=512, D=128, F=512, members=2))
  assert sum(size for _, size in found) <= 1.01 * 2 * 512 * 128 * 4


@pytest.mark.integration
def test_taking_a_member_out_of_its_stack_spreads_it(store):
  # Or saving would need the memory of the whole stack on every device.
  run = start(
    store, SWEEP, settings(members='stacked'), mesh=mesh_of(sae=2, model=2)
  )
  for saved in run.checkpoint()['members'].values():
    W_dec = saved['params']['W_dec']
    assert W_dec.sharding.shard_shape(W_dec.shape) == (16, 16)


@pytest.mark.parametrize('way', ['dense', 'blocked'])
def test_a_step_costs_seven_matrix_products_and_a_pass_over_parameters(way):
  B, D, F = 1024, 512, 512  # One block, since the analysis counts a loop once.
  flops = compiled(mesh_of(), B=B, D=D, F=F, way=way).cost_analysis()['flops']
  assert 7 <= flops / (2 * B * D * F) <= 7.1
