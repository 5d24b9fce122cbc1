"""What bounds a step on many chips: the arithmetic, and what is compiled."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from benchmarks.scaling import cases, cells
from launch.preflight import roofline, topology
from tests.support import tpu_compiler
from tests.support.commands import run


def test_bytes_on_the_wire():
  sent = lambda kind, size: roofline.wire_bytes(kind, size, 4)
  assert sent('all-reduce', 100) == 150
  assert sent('all-gather', 100) == 75
  assert sent('reduce-scatter', 25) == 75
  assert sent('all-to-all', 100) == 75
  assert sent('collective-permute', 100) == 100
  assert roofline.wire_bytes('all-reduce', 100, 1) == 0


@pytest.mark.parametrize(
  ('generation', 'bounds', 'taken', 'count'),
  [
    ('v5e', (2, 4), (2, 4), 2),  # No ring is closed.
    ('v5e', (16, 16), (16, 16), 4),
    ('v5e', (16, 16), (16, 1), 2),
    ('v5e', (16, 16), (16, 4), 3),
    ('v5e', (8, 16), (8, 16), 3),
    ('v5p', (4, 4, 4), (4, 4, 4), 6),
    ('v5p', (2, 4, 4), (2, 4, 4), 3),  # Part of a cube.
    ('v5p', (4, 8, 8), (1, 8, 4), 3),
  ],
)
def test_links_that_a_group_can_use(generation, bounds, taken, count):
  places = np.indices(taken).reshape(len(taken), -1).T
  chip = roofline.CHIPS[generation]
  assert roofline.links(places, bounds, chip) == count


def test_groups_that_lie_across_each_other_share_the_links_between():
  chip, link = roofline.CHIPS['v5e'], 1600e9 / 8 / 4
  seconds = lambda groups, bounds=(2, 4), kind='all-reduce', size=672e6: (
    roofline.network_seconds(kind, size, np.array(groups), bounds, chip)
  )
  # Each pair has a side of its own, and one link.
  apart = [[(0, y), (1, y)] for y in range(4)]
  np.testing.assert_allclose(seconds(apart), 672e6 / link)
  # All four go over the two links in the middle.
  across = [[(x, y), (1 - x, y + 2)] for x in (0, 1) for y in (0, 1)]
  np.testing.assert_allclose(seconds(across), 4 * 672e6 / (2 * link))
  # A ring is cut twice: half an axis apart, eight pairs on each line.
  far = [[(x, y), (x, y + 8)] for x in range(16) for y in range(8)]
  np.testing.assert_allclose(seconds(far, (16, 16)), 8 * 672e6 / (2 * link))
  one = [[(x, y) for x in (0, 1) for y in range(4)]]
  np.testing.assert_allclose(seconds(one), 7 / 4 * 672e6 / (2 * link))
  sides = {
    'all-gather': 1 / 2, 'reduce-scatter': 1, 'all-to-all': 1 / 2,
    'collective-permute': 1,
  }  # fmt: skip
  for kind, part in sides.items():
    np.testing.assert_allclose(
      seconds(across, kind=kind), 4 * part * 672e6 / (2 * link)
    )


@pytest.mark.parametrize(
  ('chips', 'batch', 'split'),
  [
    (1, 4096, (1, 1)),
    (8, 4096, (1, 8)),
    (256, 4096, (2, 128)),  # The root of 256 * 32 is 91: 64 sends the same.
    (256, 16_384, (4, 64)),  # Of 256 * 8, 45: 32 and 64 send the same.
    (8, 131_072 * 64, (8, 1)),
  ],
)
def test_the_best_split_sends_least(chips, batch, split):
  assert roofline.best_split(chips, 131_072, batch) == split


def test_the_best_split_divides_features_and_rows():
  assert roofline.best_split(8, 6, 4) == (4, 2)


def test_cases_cover_their_chips():
  found = cases(131_072, 4096, 16)
  assert len(set(found)) == len(found)
  for case in found:
    chips = topology.machine(case.topology).chips
    assert np.prod(list(case.mesh.values())) == chips
  most = {c.topology.partition(':')[0] for c in found if c.sae == 16}
  assert most == set(roofline.CHIPS)


SECONDS = {'compute': 0.002, 'memory': 0.005, 'network': 0.001}


def row(topology, chips, sae=1):
  return {
    'topology': topology,
    'chips': chips,
    'mesh': {'sae': sae, 'data': 1, 'model': chips // sae},
    'seconds': SECONDS,
    **roofline.predict(SECONDS, 4000),
  }


def test_the_longest_time_is_the_bound():
  found = roofline.predict(SECONDS, 4000)
  assert found['bound'] == 'memory'
  assert found['tokens_per_second'] == pytest.approx(
    {
      'overlapped': 800_000,
      'one_after_the_other': 500_000,
      'compute_alone': 2_000_000,
    }
  )


def test_the_figure_is_an_svg_file_of_what_fits():
  lacking = {'needs': '20.00G', 'has': '15.75G'}
  small = {'topology': 'v5e:1x1', 'chips': 1, 'does_not_fit': lacking}
  small['mesh'] = {'sae': 1, 'data': 1, 'model': 1}
  rows = [small, row('v5e:2x4', 8), row('v5e:8x8', 64), row('v5e:8x8', 64, 16)]
  text = roofline.draw([*rows, row('v6e:2x4', 8)])
  root = ET.fromstring(text)
  assert root.tag == '{http://www.w3.org/2000/svg}svg'
  assert text.count('<circle') == 4 and text.count('<polygon') == 1
  assert '>v5e</text>' in text and '>v5p</text>' not in text
  assert len(text) < 100_000
  assert '**needs 20.00G of 15.75G**' in cells(small)


MEASURE = """
import json, sys
from benchmarks import scaling
sys.argv[1:] = json.loads(sys.argv[1])
scaling.main()
"""


def measured(only, tmp_path, *flags):
  """The row of a program, by the TPU's compiler."""
  argument = json.dumps([f'--only={only}', *flags, f'--results={tmp_path}'])
  command = dict(package='tests.support', config=None)
  run('snippet', argument, MEASURE, **command, **tpu_compiler.environment())
  (line,) = (tmp_path / 'scaling.jsonl').read_text().splitlines()
  (found,) = json.loads(line)['rows']
  return found


@pytest.mark.integration
def test_the_flagship_on_eight_chips(tmp_path):
  found = measured('v5e:2x4', tmp_path)
  assert found['mesh'] == {'sae': 1, 'data': 1, 'model': 8}
  # Neither weights nor their gradients are sent.
  (sums,) = found['collectives']
  assert (sums['kind'], sums['axis']) == ('all-reduce', 'model')
  assert sums['bytes'] <= 2 * 4096 * 3072 * 4 * 1.01
  assert found['held']['peak'] < 16 * roofline.GB
  assert 7 <= found['units'] <= 7.1


@pytest.mark.integration
@pytest.mark.parametrize('only', ['v5p:4x4x4', 'v5e:16x16 sae=16'])
def test_only_sums_are_sent_over_many_chips(only, tmp_path):
  # Where gradients are held to an order in memory, the compiler may gather them.
  B, D, F = 512, 256, 32_768
  shape = (f'--batch={B}', f'--width={D}', f'--features={F}')
  found = measured(only, tmp_path, *shape)
  assert {c['kind'] for c in found['collectives']} == {'all-reduce'}
  assert sum(c['bytes'] for c in found['collectives']) <= 2 * B * D * 4 * 1.02
  share = found['mesh']['model']
  assert found['held']['peak'] < 20 * D * F * 4 / share + 32 * 2**20
