"""Submitted again, watched and deleted: what must not be lost or paid twice."""

import subprocess
import sys

from tests.commands import SMOKE
from tests.conftest import ROOT

# Flags are defined once in a process: each target has its own.
BOTH = f"""
import sys
from absl import flags
from gsae_jax.errors import UserError
from launch import door, identity
from tests.launch.runs import submission

run = submission(sys.argv[1])
door.read_submission = lambda **how: run
door.read_launch = lambda target, remote: (
  run.run, identity.read_json(run.run / 'launch.json')
)
door.make_pause = lambda: lambda seconds=0: None
FLAGS = ['launch', '--run=x', '--config={SMOKE}', '--topology=v5e:2x4']

def call(target, verb, **given):
  for name, value in given.items():
    flags.FLAGS[name].value = value
  try:
    getattr(target, verb)()
  except UserError as e:
    print(e)

def states():
  print(*(about['state'] for about in identity.told(run.run).values()))
"""
TPU = """
from launch import queued, tpu
from tests.launch.fake_tpu import fake_tpu

tpu.define('submit')
flags.FLAGS([*FLAGS, '--project=my-project', '--zone=us-west4-a', '--evaluator=v5e:2x2'])
delete = queued.Cloud.delete

def delete_and_hear(cloud, name):
  delete(cloud, name)
  identity.tell(run.run, 'trainer', 'preempted', 'train', 'SIGTERM came')

with fake_tpu() as fake:
  queued_cloud = queued.Cloud
  cloud = queued.Cloud(fake.client, lambda seconds: None)
  queued.Cloud = lambda pause=None: cloud
  call(tpu, 'submit')
  call(tpu, 'submit', zone='us-east1-c')
  delete(cloud, 'projects/my-project/locations/us-west4-a/queuedResources/run1')
  call(tpu, 'submit', zone='us-west4-a', evaluator=None)
  type(cloud).delete = delete_and_hear
  call(tpu, 'delete')
  states()
  call(tpu, 'submit', zone='us-east1-c')
  call(tpu, 'delete')
  calls = list(fake.calls)
  create = queued_cloud.create

  def all_but_one(cloud, request):
    if request.queued_resource_id.endswith('-eval'):
      raise UserError('there is no quota')
    create(cloud, request)

  queued_cloud.create = all_but_one
  call(tpu, 'submit', evaluator='v5e:2x2')
  print(*(f'{call} {name[30:]}' for call, name in calls), sep='\\n')
"""
GKE = """
from launch import gke, kubectl
from launch.patience import Unreachable

gke.define('submit')
flags.FLAGS([*FLAGS, '--context=here', '--evaluator=v5e:2x2'])
there, refused = set(), []

def fake(launch, verb, *words, text=None):
  where = launch['context'], launch['namespace']
  names = {(*where, name) for name in launch['jobsets']}
  if verb == 'apply':
    there.update(names)
  if verb == 'delete':
    there.difference_update(names)
    identity.tell(run.run, 'trainer', 'preempted', 'train', 'SIGTERM came')
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
  return ''.join(f'jobset/{name}\\n' for name in found)

kubectl.run = fake
call(gke, 'submit')
call(gke, 'submit', context='elsewhere')
call(gke, 'submit', namespace='other', context='here', evaluator=None)
call(gke, 'delete')
states()
call(gke, 'submit', namespace='default', evaluator='v5e:2x2')
call(gke, 'watch')
states()
call(gke, 'delete')
call(gke, 'submit', namespace='other')
print(sorted(there))
"""


def said(script, folder):
  done = subprocess.run(
    [sys.executable, '-c', BOTH + script, folder / 'run1'],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout.splitlines()


def test_a_run_on_cloud_tpu(tmp_path):
  asked, elsewhere, alone, gone, states, again, _, half, *calls = said(
    TPU, tmp_path
  )
  west, east = (
    f'{z}/queuedResources/run1' for z in ('us-west4-a', 'us-east1-c')
  )
  assert 'asked for' in asked and 'asked for' in again
  assert f'{west} is there and' in elsewhere
  assert f'{west}-eval is there and' in alone
  assert 'are gone' in gone and states == 'deleted deleted'
  assert calls == [
    f'create {west}', f'create {west}-eval', f'force delete {west}',
    f'force delete {west}', f'force delete {west}-eval', f'create {east}',
    f'force delete {east}',
  ]  # fmt: skip
  assert half.startswith(
    f'there is no quota; projects/my-project/locations/{east}'
  )
  assert half.endswith(f'launch tpu delete --run={tmp_path}/run1 takes it back')


def test_a_run_on_gke(tmp_path):
  lines = said(GKE, tmp_path)
  there = '--run: jobset/run1 is there; watch it, or delete it first'
  assert lines[:4] == [
    there, there, 'deleted deleted', 'the cluster is away; asking again',
  ]  # fmt: skip
  found = [('here', 'other', name) for name in ('run1', 'run1-eval')]
  assert lines[-2:] == ['finished finished', str(found)]
