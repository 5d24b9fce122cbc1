"""What a run would take of TPUs: read from texts, from models, by the compiler."""

import dataclasses
import importlib
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import smoke
from gsae_jax import config as config_lib
from gsae_jax.errors import UserError
from launch.preflight import (
  compiled,
  examine,
  meshes,
  parts,
  products,
  programs,
  remedies,
  show,
  tables,
  topology,
)
from launch.preflight import model as model_lib
from launch.preflight.measure import DoesNotFit
from launch.preflight.model import read_model
from tests.support import tpu_compiler
from tests.support.commands import SMOKE, call

MESH = {'sae': 2, 'data': 2, 'model': 4}

# As the compiler writes them: on chips' own memory 'S(1)', one channel twice.
PROGRAM = """
%other {
  %c = f32[8,4]{1,0} all-reduce(%f), channel_id=1, replica_groups=[2,4]<=[8], x=1
}

ENTRY %main {
  %a = f32[8,4]{1,0:T(8,128)} parameter(0)
  %b = bf16[4]{0:T(128)S(1)} parameter(1)
  %f = (f32[8,4]{1,0:T(8,128)}, f32[]{:T(128)S(1)}) fusion(%a, %b), calls=%q
  %g = f32[8,4]{1,0:T(8,128)} get-tuple-element(%f), index=0
  %s = (f32[8,4]{1,0:S(1)}, f32[8,4]{1,0}, u32[]{:S(2)}) copy-start(%g)
  %d = f32[8,4]{1,0:S(1)} copy-done(%s)
  %t = (s32[]{:S(2)}, s32[]{:S(2)}, u32[]{:S(2)}) copy-start(%n)
  %r = (f32[8,4]{1,0:S(1)}, /*index=1*/s32[2]{0}) all-reduce(%d, %i), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}, use_global_device_ids=true
}
"""


@pytest.mark.parametrize(
  ('groups', 'group', 'axes'),
  [
    ('{{0,1,2,3},{4,5,6,7},{8,9,10,11}}', [0, 1, 2, 3], ('model',)),
    ('{}', range(16), ('sae', 'data', 'model')),
    ('[8,2]<=[2,2,4]T(0,2,1)', [0, 4], ('data',)),
    ('[4,4]<=[16]', [0, 1, 2, 3], ('model',)),
    ("mesh['axis_0'=2,'axis_1'=8] {'axis_0'}", [0, 8], ('sae',)),
    ("mesh['axis_0'=2,'axis_1'=8] {'axis_0','axis_1'}", range(16), tuple(MESH)),
    (
      "mesh['axis_0'=2,'axis_1'=4,'axis_2'=2], device_ids=([2,2,4]T(0,2,1)) "
      "{'axis_2'}",
      [0, 4],
      ('data',),
    ),
  ],
)
def test_groups_say_which_axis_is_summed_over(groups, group, axes):
  found = compiled.groups_of(groups, 16)
  assert found[0].tolist() == list(group)
  assert found.shape[1] == len(group)
  assert len(set(found.ravel().tolist())) == found.size
  assert compiled.axes_of(found[0], MESH) == axes


def test_groups_of_another_form_are_an_error():
  with pytest.raises(ValueError, match='not known'):
    compiled.groups_of("mesh['axis_0'=16] {'axis_0':(1)4}", 16)


def test_a_program_is_read():
  text = compiled.Text(PROGRAM)
  (one,) = text.collectives()
  assert (one.kind, one.size, one.times) == ('all-reduce', 8 * 4 * 4 + 2 * 4, 1)
  assert compiled.groups_of(one.groups, 8).tolist() == [
    [0, 2, 4, 6],
    [1, 3, 5, 7],
  ]
  # The fusion reads one matrix and writes one, the copy reads it, and of the sum
  # two integers lie outside.
  assert text.memory_bytes() == 3 * 8 * 4 * 4 + 2 * 4


def test_of_what_starts_only_results_are_counted():
  program = """
ENTRY %main {
  %a = f32[8,4]{1,0} parameter(0)
  %r = (f32[8,4]{1,0}, s32[2]{0}) all-reduce-start(%a, %a), channel_id=1, replica_groups=[1,8]<=[8]
  %g = (f32[8,4]{1,0}, f32[64,4]{1,0}) all-gather-start(%a), channel_id=2, replica_groups=[1,8]<=[8]
  %p = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), channel_id=3, source_target_pairs={{0,1}}
}
"""
  found = {c.kind: c.size for c in compiled.Text(program).collectives()}
  assert found == {
    'all-reduce': 8 * 4 * 4 + 2 * 4,
    'all-gather': 64 * 4 * 4,
    'collective-permute': 8 * 4 * 4,
  }


# A loop of 16 turns that takes a row of one array and puts it into another.
LOOP = """
%slice (p.0: f32[16,8], p.1: s32[]) -> f32[8] {
  %p.0 = f32[16,8]{1,0} parameter(0)
  %p.1 = s32[]{:S(6)} parameter(1)
  %ds = f32[1,8]{1,0} dynamic-slice(%p.0, %p.1, %p.1), dynamic_slice_sizes={1,8}
  ROOT %bc = f32[8]{0:S(1)} bitcast(%ds)
}

%body (w: (s32[], f32[16,8], f32[16,8])) -> (s32[], f32[16,8], f32[16,8]) {
  %w = (s32[]{:S(6)}, f32[16,8]{1,0}, f32[16,8]{1,0}) parameter(0)
  %i = s32[]{:S(6)} get-tuple-element(%w), index=0
  %x = f32[16,8]{1,0} get-tuple-element(%w), index=1
  %y = f32[16,8]{1,0} get-tuple-element(%w), index=2
  %row = f32[8]{0:S(1)} fusion(%x, %i), kind=kLoop, calls=%slice
  %sum = f32[8]{0:S(1)} all-reduce(%row), channel_id=7, replica_groups={{0,1},{2,3}}, to_apply=%add
  %new = f32[16,8]{1,0} dynamic-update-slice(%y, %sum, %i)
  ROOT %t = (s32[]{:S(6)}, f32[16,8]{1,0}, f32[16,8]{1,0}) tuple(%i, %x, %new)
}

%bound (w.1: (s32[], f32[16,8], f32[16,8])) -> pred[] {
  %n = s32[] constant(16)
  %w.1 = (s32[]{:S(6)}, f32[16,8]{1,0}, f32[16,8]{1,0}) parameter(0)
  %i.1 = s32[]{:S(6)} get-tuple-element(%w.1), index=0
  ROOT %lt = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (a: f32[16,8]) -> (s32[], f32[16,8], f32[16,8]) {
  %a = f32[16,8]{1,0} parameter(0)
  %z = s32[]{:S(6)} constant(0)
  %in = (s32[]{:S(6)}, f32[16,8]{1,0}, f32[16,8]{1,0}) tuple(%z, %a, %a)
  ROOT %while = (s32[]{:S(6)}, f32[16,8]{1,0}, f32[16,8]{1,0}) while(%in), condition=%bound, body=%body
}
"""


def test_loops_count_as_often_as_they_go_around():
  text = compiled.Text(LOOP)
  (one,) = text.collectives()
  assert (one.kind, one.size, one.times) == ('all-reduce', 8 * 4, 16)
  # Of both arrays a row a turn, not all of them.
  assert text.memory_bytes() == 16 * (8 * 4 + 8 * 4)


def test_products_are_counted_as_they_are_needed():
  w = jnp.ones((3, 5))
  loop = lambda x: jax.lax.map(lambda x: x @ w, x)
  x = jnp.ones((7, 2, 3))
  once = 2 * 2 * 3 * 5
  assert products.count(loop, x) == products.Products(7 * once, 7 * once)
  exact = lambda x: jnp.matmul(x, w, precision='highest')
  assert products.count(exact, x[0]) == products.Products(once, 6 * once)
  # The gradient of x is not asked for.
  grad = jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w)))
  assert products.count(grad, w, x[0]).flops == 2 * once
  # Nor is what nothing uses.
  assert products.count(lambda x: (x @ w, x)[1], x[0]).flops == 0


def test_a_step_is_seven_units_or_five():
  config = config_lib.parse(smoke.get_config())
  mesh = jax.sharding.Mesh(
    np.array(jax.devices()[:1]).reshape(1, 1, 1), ('sae', 'data', 'model')
  )
  groups = programs.groups(
    config, {'mlp_out.0': 128, 'mlp_hidden.0': 512}, mesh
  )
  assert len(groups) == 4
  for group in groups:
    step = programs.step(group, config, topology.machine('v5e:1x1'), mesh)
    module = group.module
    unit = 2 * config.train.batch_size * module.width * module.features
    units = {'gated': 7, 'relu': 5}[group.members[0].config.architecture]
    # Beside them, a vector times the encoder.
    assert step.products().flops == pytest.approx(units * unit, rel=0.02)


def test_products_of_all_devices():
  x = jnp.ones((4, 2, 3))
  each = jax.pmap(lambda x: x @ jnp.ones((3, 5)))
  assert products.count(each, x).flops == 4 * 2 * 2 * 3 * 5


@pytest.mark.parametrize(
  ('name', 'chips', 'hosts', 'host'),
  [
    ('v5e:1x1', 1, 1, 'v5e:1x1'),
    ('v5e:2x4', 8, 1, 'v5e:2x4'),
    ('v5e:4x4', 16, 4, 'v5e:2x2'),
    ('v6e:2x4', 8, 1, 'v6e:2x4'),
    ('v5p:2x2x2', 8, 2, 'v5p:2x2x1'),
  ],
)
def test_hosts_of_a_slice(name, chips, hosts, host):
  found = topology.machine(name)
  assert (found.chips, found.hosts, found.host.name) == (chips, hosts, host)
  assert found.host.hosts == 1


@pytest.mark.parametrize(
  ('name', 'match'),
  [
    ('v7:2x2', "'v7:2x2' is not known.*v5e, v5p, v6e.*v5e:2x4"),
    ('v5e', "'v5e' is not known"),
    ('v5litepod-16', "'v5litepod-16' is called v5e:4x4 here; give that"),
    ('v5e:2x4x2', 'must have 2 axes.*v5e:2x4'),
    ('v5p:2x2', 'must have 3 axes'),
    ('v6e:0x4', 'one chip or more'),
  ],
)
def test_slices_that_there_are_not(name, match):
  with pytest.raises(UserError, match=match):
    topology.machine(name)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr(topology.importlib.util, 'find_spec', lambda _: None)
  with pytest.raises(UserError, match=r"pip install '.\[tpu\]'"):
    topology.devices(topology.machine('v5e:2x4'))


def test_a_model_is_read_of_its_config_alone(tmp_path):
  lm = lambda path: config_lib.LMConfig(str(path), None, 'bfloat16', 'auto')
  with pytest.raises(UserError, match='has no config.json'):
    read_model(lm(tmp_path))
  (tmp_path / 'config.json').write_text(json.dumps(tables.RAW['gelu_1l']))
  model = read_model(lm(tmp_path))
  assert model.shapes['W_E'] == (48_262, 512)
  assert 2 * 53e6 < model.bytes < 2 * 54e6
  assert model.widths(['mlp_hidden.0']) == {'mlp_hidden.0': 2048}
  with pytest.raises(UserError, match='layers 0 to 0'):
    model.widths(['mlp_out.1'])
  (tmp_path / 'config.json').write_text('{"model_type": "mamba"}')
  with pytest.raises(UserError, match="'mamba'; supported are"):
    read_model(lm(tmp_path))
  (tmp_path / 'config.json').write_text('{"model_type": "gelu_1l"}')
  with pytest.raises(UserError, match="no 'd_head'"):
    read_model(lm(tmp_path))


@pytest.fixture
def work(monkeypatch):
  """Two kinds of SAEs on slices whose chips lie in a row."""

  def mesh(machine, *sizes):
    chip = lambda i: types.SimpleNamespace(coords=(i, 0), platform='tpu')
    chips = np.array([chip(i) for i in range(machine.chips)]).reshape(sizes)
    shape = dict(zip(('sae', 'data', 'model'), sizes, strict=True))
    return types.SimpleNamespace(shape=shape, devices=chips)

  monkeypatch.setattr(meshes, '_mesh', mesh)
  raw = smoke.get_config()
  raw.train.batch_size = 4096
  raw.saes = tuple(m | {'features': 2**17} for m in raw.saes[:2] * 2)
  for i, member in enumerate(raw.saes):
    member['name'] = str(i)
  config = config_lib.parse(raw)
  one = jax.sharding.Mesh(
    np.array(jax.devices()[:1]).reshape(1, 1, 1), ('sae', 'data', 'model')
  )
  groups = programs.groups(config, dict.fromkeys(config.sites, 3072), one)
  unit = 2.0 * 4096 * 3072 * 2**17
  of = {'gated': 7 * unit, 'relu': 5 * unit}
  counted = [
    products.Products(*[of[g.members[0].config.architecture]] * 2)
    for g in groups
  ]
  return meshes.Work(config, groups, counted)


def test_the_best_mesh_sends_least(work):
  machine = topology.machine('v5e:2x4')
  ranked = meshes.rank(work, machine)
  assert {e.sizes for e in ranked} == {
    (sae, data, 8 // sae // data)
    for sae in (1, 2)
    for data in (1, 2, 4, 8)
    if sae * data <= 8
  }
  best = ranked[0]
  assert best.data == 1 and best.needs < machine.chip.usable
  # States are 8 bytes for a parameter, and come in whole members.
  states = 4 * 8 * 2 * 3072 * 2**17 / 8
  assert states < best.needs < 1.6 * states
  # At the peak, 24 units take so long.
  assert best.seconds == pytest.approx(
    24 * 2 * 4096 * 3072 * 2**17 / 8 / 197e12, rel=0.2
  )
  fits = [e.needs <= machine.chip.usable for e in ranked]
  assert fits == sorted(fits, reverse=True)


def test_what_would_fit_is_said(work):
  machine = topology.machine('v5e:2x2')
  now = meshes.estimate(work, machine, 1, 4, 1)
  assert now.needs > machine.chip.usable
  found = [list(kind) for kind in remedies.of_training(work, machine, now)]
  assert [[r.words for r in kind][:1] for kind in found] == [
    ['mesh sae=1 data=1 model=4 on the same chips'],
    [],  # Codes are not what is too large.
    ['1 of the 4 SAEs at a time'],
    ['v5e:2x4 with mesh sae=1 data=1 model=8'],
  ]
  mesh, fewer, more = (kind[0] for kind in found if kind)
  assert mesh.sizes == (1, 1, 4) and fewer.sizes == (1, 4, 1)
  assert mesh.config is work.config and len(fewer.config.saes) == 1
  assert more.machine.chips == 8 and more.sizes == (1, 1, 8)
  # With a language model beside it there is less room, and one host.
  assert {r.machine.hosts for r in found[3]} > {1}
  half = machine.chip.usable / 2
  along = remedies.of_training(work, machine, now, half)
  few, more = list(along[2]), list(along[3])
  assert few == [] and [r.machine.name for r in more] == ['v5e:2x4']
  # Of codes `[B, F]` an eighth is held, and gradients are summed up.
  whole, small = (
    meshes.estimate(work, machine, 1, 1, 4, microbatches=n) for n in (1, 8)
  )
  assert 0.9e9 < whole.needs - small.needs < 1.2e9


@pytest.mark.parametrize(
  'experiment, names',
  [
    (
      'smoke',
      [
        'step, gated 64, D=128', 'step, gated 64, D=512',
        'step, relu 96, D=128', 'step, relu 96, D=512',
      ],
    ),
    ('variants', None),
  ],
)  # fmt: skip
def test_each_step_is_compiled_once(experiment, names, monkeypatch):
  module = importlib.import_module(f'experiments.{experiment}')
  config = config_lib.parse(module.get_config())
  one = jax.sharding.Mesh(
    np.array(jax.devices()[:1]).reshape(1, 1, 1), ('sae', 'data', 'model')
  )
  model = types.SimpleNamespace(
    widths=lambda sites: {s: 512 if 'hidden' in s else 128 for s in sites},
    module=types.SimpleNamespace(
      config=types.SimpleNamespace(
        site_widths=lambda: dict.fromkeys(config.sites, 128)
      )
    ),
  )
  machine = topology.machine('v5e:1x1')
  part = parts.train(config, model, machine, one)
  found = sorted(p.name for p in part.programs)
  assert len(set(found)) == len(found) > 3 and names in (None, found)
  asked = []
  monkeypatch.setattr(
    remedies, 'measure', lambda program: asked.append(program.name) or {}
  )
  steps = remedies.Steps(model)
  for again in (part, parts.train(config, model, machine, one)):
    for program in again.programs:
      steps.measure(program)
  assert sorted(asked) == found
  half = dataclasses.replace(
    config, train=dataclasses.replace(config.train, microbatches=2)
  )
  for program in parts.train(half, model, machine, one).programs:
    steps.measure(program)
  assert len(asked) == 2 * len(found)


def test_only_what_fits_when_it_is_compiled_is_said():
  remedy = lambda words: remedies.Remedy(words, None, None)
  of_kind = lambda *words: map(remedy, words)
  fits = {'b': 3.5, 'd': 2.25}
  told = []

  def total(remedy):
    if remedy.words == 'c':
      raise UserError('it is not divisible')
    needs = fits.get(remedy.words, 20.0)
    return {'fits': needs < 16, 'needs': needs * 2**30}

  kinds = of_kind('a', 'b', 'never'), of_kind('c', 'd'), of_kind(*'efgb')
  said = remedies.confirmed(kinds, total, told.append)
  assert said == ['b (3.50 GiB)', 'd (2.25 GiB)']
  assert [line[-1] for line in told] == list('abcdefg')


ROWS = [
  {
    'needs': needs,
    'runs': runs,
    'seconds': {'compute': compute, 'memory': 0.003, 'network': 0.001},
  }
  for needs, runs, compute in ((5e9, 3, 0.004), (9e9, 1, 0.002))
]


def test_programs_add_up_to_a_part():
  machine = topology.machine('v5e:2x2')
  part = parts.Part('train', (), 0, 1000, 4096, 6144)
  total = parts.total(part, ROWS, machine)
  apart, together = 3 * 0.008 + 0.006, 3 * 0.004 + 0.003
  assert total['tokens_per_second'] == pytest.approx(
    [4096 / apart, 4096 / together]
  )
  assert total['hours'] == pytest.approx(
    [1000 * together / 3600, 1000 * apart / 3600]
  )
  assert total['storage'][1] == pytest.approx(6144 * 4096 / together)
  assert (total['bound'], total['needs']) == ('compute', 9e9)
  assert total['fits'] and total['tokens'] == 4_096_000
  # Four chips for two dollars: 8 dollars an hour.
  lines = show.summary(total, machine, 2.0)
  assert lines[0] == 'train: 8.38 of 15.75 GiB a chip, fits'
  assert lines[1].endswith('h for the 4,096,000 tokens of the run')
  assert lines[2] == '  storage: must read 839 to 1,678 MB/s'
  assert lines[3] == (
    '  cost: 0.0333 to 0.0667 dollars of the run, 8.14 to 16.3 for a billion '
    'tokens'
  )
  assert len(show.summary(total, machine, None)) == 3


def test_a_streamed_model_takes_turns_with_training():
  machine = topology.machine('v5e:2x2')
  part = parts.Part('train', (), 0, 1000, 4096, 0)
  total = parts.total(part, ROWS, machine)
  both = parts.streamed(total, total)
  assert both['hours'] == pytest.approx([2 * h for h in total['hours']])
  assert both['needs'] == 18e9 and not both['fits']
  fast = {'bound': 'memory', 'tokens_per_second': [1e9, 2e9], 'needs': 1e9}
  slow = fast | {'tokens_per_second': [1.0, 2.0]}
  bounds = [
    parts.streamed(total, f | {'hours': 1})['bound'] for f in (fast, slow)
  ]
  assert bounds == ['compute', 'memory']
  assert show.summary(both, machine, None)[0].endswith('DOES NOT FIT')


def test_a_streamed_model_has_one_host():
  raw = smoke.get_config()
  raw.loader.source = 'stream'
  machine = topology.machine('v5e:4x4')
  with pytest.raises(UserError, match='one process, and there are 4 hosts'):
    examine.examine(config_lib.parse(raw), None, machine)


def test_the_page_has_what_was_found():
  done = tables.read(tables.RESULTS)
  assert done.keys() <= {(str(c), p) for c in tables.CASES for p in parts.PARTS}
  _, mark, below = tables.PAGE.read_text().partition(tables.MARK)
  assert mark and below == tables.page(done)
  for (case, part), line in done.items():
    if part != 'train':
      continue
    assert line['total']['fits'] != bool(line['problems']), case
    for row in line['rows']:
      # Weights and their gradients stay where they are.
      assert {c['kind'] for c in row['collectives']} == {'all-reduce'}


def preflight(*flags, config=SMOKE):
  """Exit code, standard output and standard error of the command."""
  command = dict(package='launch.preflight', config=config)
  return call('command', *flags, **command, **tpu_compiler.environment())


@pytest.mark.integration
def test_what_the_compiler_refuses_is_one_line():
  code, _, err = preflight('--topology=v5e:3x5')
  assert code == 1 and 'Traceback' not in err
  last = err.strip().splitlines()[-1]
  assert last.startswith("error: --topology: the compiler refuses 'v5e:3x5' (")


LARGE = """
from experiments import smoke

def get_config():
  c = smoke.get_config()
  c.saes = tuple(
    c.saes[2] | {'features': 2**16, 'name': str(i)} for i in range(34)
  )
  return c
"""


@pytest.mark.integration
def test_what_does_not_fit_is_refused_with_the_number(tmp_path):
  path = tmp_path / 'large.py'
  path.write_text(LARGE)
  code, out, err = preflight(
    '--topology=v5e:1x1',
    '--parts=train',
    '--config.train.members=stacked',
    '--config.train.precision=bfloat16',  # It takes a third of the time.
    config=path,
  )
  assert code == 1 and 'Traceback' not in err
  last = err.strip().splitlines()[-1]
  assert re.match(r'error: train needs \d+\.\d\d GiB of the 15\.75', last)
  would = last.partition('; what would fit: ')[2]
  assert re.fullmatch(
    r'\d+ of the 34 SAEs at a time \(\d+\.\d\d GiB\); or '
    r'v5e:2x2 with mesh sae=1 data=1 model=4 \(\d+\.\d\d GiB\)',
    would,
  )
  assert all(float(n) < 15.75 for n in re.findall(r'\((\S+) GiB', would))
  assert '**needs ' in out and 'does not fit' in out


def test_fewer_contexts_and_larger_chips_are_said(monkeypatch):
  """Of a harvest whose contexts take 8 MiB each; nothing is compiled."""

  def measure(program):
    peak = program.args[1].shape[0] // program.mesh.size * 2**23
    usable = program.machine.chip.usable
    if peak > usable:
      raise DoesNotFit(*(f'{n / 2**30:.2f}G' for n in (peak, usable)))
    return {
      'flops_per_chip': 1, 'memory_bytes': 1, 'collectives': [],
      'held': {
        'arguments': 2**40, 'temporary': 0, 'code': 0, 'peak': peak,
      },
      'seconds': {'compute': 1, 'memory': 0, 'network': 0},
    }  # fmt: skip

  monkeypatch.setattr(remedies, 'measure', measure)
  monkeypatch.setattr(parts.measured, '__defaults__', (measure,))
  cpus = lambda machine: jax.devices()[: machine.chips]
  for module in (topology, model_lib):
    monkeypatch.setattr(module, 'devices', cpus)
  raw = smoke.get_config()
  raw.store.batch_contexts = 4096
  config = config_lib.parse(raw)
  machine = topology.machine('v5e:1x1')
  told = []
  found = examine.examine(
    config, read_model(config.lm), machine, wanted=['harvest'], say=told.append
  )
  # The last pass's float32 rows of both sites are on their way to the host.
  assert 4096 * 32 * (128 + 512) * 4 == 0.3125 * 2**30
  assert found.problems == [
    'harvest needs 32.31 GiB of the 15.75 that a chip of v5e:1x1 has; what would '
    'fit: store.batch_contexts=1024 (8.00 GiB); or v5p:2x2x1 (32.00 GiB)'
  ]
  (row,) = (line for line in told if line.startswith('| forward'))
  assert '**needs 32.00G of 15.75G**' in row
  # 2048 contexts are not compiled: they would take 16 GiB.
  assert [line for line in told if line.startswith('compiling')] == [
    'compiling what may fit: store.batch_contexts=1024',
    'compiling what may fit: v5p:2x2x1',
  ]


# The compiler takes 12 seconds for each of two programs that fill a chip.
@pytest.mark.slow
def test_as_many_contexts_as_fit_are_said():
  code, out, err = preflight(
    '--topology=v5e:1x1',
    '--parts=harvest',
    '--config.store.batch_contexts=131072',
    '--config.lm.dtype=bfloat16',  # It takes a third of the time.
  )
  assert code == 1 and 'Traceback' not in err
  last = err.strip().splitlines()[-1]
  found = re.search(r'would fit: store.batch_contexts=(\d+) \((\S+) GiB', last)
  assert 4096 <= int(found[1]) < 131072 and 4 < float(found[2]) < 15.75


@pytest.mark.integration
def test_a_divided_model_sends_sums_and_no_weights():
  code, out, err = preflight(
    '--topology=v5e:2x2',
    '--parts=harvest',
    '--config.lm.layout=tensor',
    '--config.mesh.model=4',
  )
  assert code == 0, err[-2000:]
  (row,) = (s for s in out.splitlines() if s.startswith('| forward'))
  cells = [c.strip() for c in row.split('|')]
  assert cells[1].startswith('forward, 8 x 32, tensor')
  # Of embeddings, attention and MLP, `[B, L, D]` in float32 each.
  sums = 3 * 8 * 32 * 128 * 4 / 1e6
  assert cells[5] == f'3 all-reduce over model {sums:.3g}'
