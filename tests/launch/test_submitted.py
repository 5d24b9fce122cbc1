"""Submitted again, watched and deleted: what must not be lost or paid twice."""

import functools

import pytest

from gsae_jax.errors import UserError
from launch import door, identity, kubectl, queued
from launch.patience import Unreachable
from tests.support.commands import SMOKE
from tests.support.fake_tpu import fake_tpu
from tests.support.submissions import submission

RUN = '--run=gs://bucket/runs/run1'
SUBMIT = 'submit', RUN, f'--config={SMOKE}', '--topology=v5e:2x4'


@pytest.fixture
def run(tmp_path, monkeypatch):
  """A run whose folder is on this machine, and whose code is not packed."""
  run = submission(tmp_path / 'run1')
  monkeypatch.setattr(door, 'read_submission', lambda given, **how: run)
  monkeypatch.setattr(door, 'run_folder', lambda given, remote: run.run)
  return run


def states(run):
  return [about['state'] for about in identity.told(run.run).values()]


def hear_late(run):
  """Tells what a host says while it goes down."""
  identity.tell(run.run, 'trainer', 'preempted', 'train', 'SIGTERM came')


def test_a_run_on_cloud_tpu(run, launch, monkeypatch):
  place = 'projects/my-project/locations'
  west, east = (
    f'{place}/{zone}/queuedResources/run1'
    for zone in ('us-west4-a', 'us-east1-c')
  )
  create, delete = queued.Cloud.create, queued.Cloud.delete

  def delete_and_hear(cloud, name):
    delete(cloud, name)
    hear_late(run)

  def create_all_but_one(cloud, request):
    if request.queued_resource_id.endswith('-eval'):
      raise UserError('there is no quota')
    create(cloud, request)

  tpu = functools.partial(launch, 'tpu')
  submit = functools.partial(tpu, *SUBMIT, '--project=my-project')
  both = '--evaluator=v5e:2x2'
  with fake_tpu() as fake:
    cloud = queued.Cloud(fake.client, lambda seconds: None)
    monkeypatch.setattr(queued, 'Cloud', lambda pause=None: cloud)
    code, asked = submit('--zone=us-west4-a', both)
    assert code == 0 and 'asked for' in asked
    code, elsewhere = submit('--zone=us-east1-c', both)
    assert code == 1 and f'{west} is there and' in elsewhere
    delete(cloud, west)
    code, alone = submit('--zone=us-west4-a')
    assert code == 1 and f'{west}-eval is there and' in alone
    monkeypatch.setattr(type(cloud), 'delete', delete_and_hear)
    code, gone = tpu('delete', RUN)
    assert code == 0 and 'are gone' in gone
    assert states(run) == ['deleted', 'deleted']
    code, again = submit('--zone=us-east1-c')
    assert code == 0 and 'asked for' in again
    assert tpu('delete', RUN)[0] == 0
    assert fake.calls == [
      ('create', west), ('create', f'{west}-eval'), ('force delete', west),
      ('force delete', west), ('force delete', f'{west}-eval'),
      ('create', east), ('force delete', east),
    ]  # fmt: skip
    monkeypatch.setattr(type(cloud), 'create', create_all_but_one)
    code, half = submit('--zone=us-east1-c', both)
  assert code == 1 and half == (
    f'error: there is no quota; {east} was asked for before: python -m launch '
    f'tpu delete --run={run.run} takes it back\n'
  )


def test_a_run_on_gke(run, launch, monkeypatch):
  there, refused = set(), []

  def cluster(launch, verb, *words, text=None):
    where = launch['context'], launch['namespace']
    names = {(*where, name) for name in launch['jobsets']}
    if verb == 'apply':
      there.update(names)
    if verb == 'delete':
      there.difference_update(names)
      hear_late(run)
    if '-ojson' in words:
      if not refused:
        refused.append(1)
        raise Unreachable('the cluster is away')
      for role in identity.ROLES:
        identity.tell(run.run, role, 'finished', 'train', None)
      return ''
    if verb != 'get':
      return ''
    found = sorted(name[2] for name in names & there)
    return ''.join(f'jobset/{name}\n' for name in found)

  monkeypatch.setattr(kubectl, 'run', cluster)
  gke = functools.partial(launch, 'gke')
  submit = functools.partial(gke, *SUBMIT)
  both = '--evaluator=v5e:2x2'
  is_there = (
    1,
    ('error: --run: jobset/run1 is there; watch it, or delete it first\n'),
  )
  assert submit('--context=here', both) == (0, '')
  assert submit('--context=elsewhere', both) == is_there
  assert submit('--context=here', '--namespace=other') == is_there
  assert gke('delete', RUN)[0] == 0
  assert states(run) == ['deleted', 'deleted']
  assert submit('--context=here', both) == (0, '')
  code, watched = gke('watch', RUN, '--poll_seconds=0')
  assert code == 0
  assert watched.startswith('the cluster is away; asking again\n')
  assert states(run) == ['finished', 'finished']
  assert gke('delete', RUN)[0] == 0
  assert submit('--context=here', '--namespace=other', both) == (0, '')
  assert there == {('here', 'other', 'run1'), ('here', 'other', 'run1-eval')}
