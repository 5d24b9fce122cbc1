"""Slices, and what is refused of what a user may write."""

import pytest

from gsae_jax.errors import UserError
from launch import specs
from tests.support.submissions import spec


@pytest.mark.parametrize(
  'text, accelerator_type, hosts, chips_per_host',
  [
    ('v5e:1x1', 'v5litepod-1', 1, 1),
    ('v5e:2x4', 'v5litepod-8', 1, 8),
    ('v5e:4x4', 'v5litepod-16', 4, 4),
    ('v5e:16x16', 'v5litepod-256', 64, 4),
    ('v6e:2x4', 'v6e-8', 1, 8),
    ('v5p:2x2x2', 'v5p-16', 2, 4),
    ('v4:2x2x1', 'v4-8', 1, 4),
    ('tpu7x:2x2x4', None, 4, 4),
  ],
)
def test_what_a_slice_is(text, accelerator_type, hosts, chips_per_host):
  found = specs.parse_slice(text, '--topology')
  assert str(found) == text
  assert found.accelerator_type == accelerator_type
  assert (found.hosts, found.chips_per_host) == (hosts, chips_per_host)


@pytest.mark.parametrize(
  'changes, match',
  [
    ({'zone': 'us-west4'}, "--zone: 'us-west4' is a region; a zone is like us"),
    ({'zone': 'US-WEST4-A'}, "--zone: 'US-WEST4-A' is not a zone"),
    ({'zone': 'us-west4-a '}, '--zone'),
    ({'project': 'My Project'}, "--project: 'My Project' is not the id"),
    ({'project': '123456789'}, '--project'),
    ({'topology': 'v5e:3x4'}, "unknown topology '3x4' of v5e; it has 1x1, 2x2"),
    ({'topology': 'v5e'}, "unknown topology '' of v5e"),
    ({'topology': 'h100:8'}, "unknown accelerator 'h100:8'; give GENERATION"),
    ({'topology': 'v5litepod-16'}, 'is called v5e:4x4 here'),
    ({'topology': 'tpu7x:2x2x1'}, 'does not give tpu7x:2x2x1; .*launch gke'),
    ({'slices': 0}, '--slices: 0 is too small'),
    ({'valid_hours': 0}, '--valid_hours: 0 is too small'),
    ({'service_account': 'me'}, "--service_account: 'me' is not NAME@PROJECT"),
  ],
)
def test_what_is_refused(changes, match):
  with pytest.raises(UserError, match=match) as refusal:
    spec(**changes)
  assert '\n' not in str(refusal.value)


def test_zones_that_there_are():
  for zone in ('us-west4-a', 'us-south1-ai1b', 'northamerica-northeast1-c'):
    assert spec(zone=zone).zone == zone


@pytest.mark.parametrize('name', ['Gemma', '7b', 'a_b', 'a' * 41, 'a-', ''])
def test_names_that_no_resource_can_have(name):
  with pytest.raises(UserError, match='--run: its last part'):
    specs.check_name(name)


def test_names_that_resources_can_have():
  for name in ('a', 'gemma-7b-2', 'a' * 40):
    specs.check_name(name)
