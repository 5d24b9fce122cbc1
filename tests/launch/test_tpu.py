"""Queued resources, against a service made of the client's own types."""

import grpc
import pytest
from etils import epath
from google.api_core.exceptions import RetryError
from google.auth.exceptions import DefaultCredentialsError
from google.cloud import tpu_v2

from gsae_jax.errors import UserError
from launch import identity, queued
from launch.follow import follow
from tests.support.fake_tpu import USUAL, State, fake_tpu
from tests.support.submissions import spec

NAME = 'projects/my-project/locations/us-west4-a/queuedResources/run1'


@pytest.fixture
def tpu():
  with fake_tpu() as fake:
    yield fake


@pytest.fixture
def cloud(tpu, monkeypatch):
  monkeypatch.setattr(queued, '_POLL', 0.0)
  return queued.Cloud(tpu.client)


def test_the_request_is_what_was_asked_for():
  one = queued.to_json(queued.build(spec(spot=True), 'run1', '#!script'))
  (node,) = one['queuedResource']['tpu']['nodeSpec']
  assert one['parent'] == 'projects/my-project/locations/us-west4-a'
  assert one['queuedResourceId'] == node['nodeId'] == 'run1'
  assert one['queuedResource']['spot'] == {}
  assert node['node'] == {
    'acceleratorType': 'v5litepod-16',
    'runtimeVersion': 'v2-alpha-tpuv5-lite',
    'metadata': {'startup-script': '#!script'},
    'networkConfig': {'network': 'default', 'enableExternalIps': True},
    'serviceAccount': {
      'scope': ['https://www.googleapis.com/auth/cloud-platform']
    },
  }
  assert queued.full_name(one) == queued.name_of(spec(), 'run1') == NAME
  many = spec(slices=3, valid_hours=2, service_account='me@x', network='mine')
  many = queued.to_json(queued.build(many, 'run1', ''))['queuedResource']
  (node,) = many['tpu']['nodeSpec']
  assert node['multisliceParams'] == {'nodeCount': 3, 'nodeIdPrefix': 'run1'}
  assert 'nodeId' not in node and 'spot' not in many
  assert many['queueingPolicy'] == {'validUntilDuration': '7200s'}
  assert node['node']['serviceAccount']['email'] == 'me@x'
  assert node['node']['networkConfig']['network'] == 'mine'


def test_wrong_fields_are_refused_before_anything_is_sent(tpu):
  value = queued.to_json(queued.build(spec(), 'run1', ''))
  value['queuedResource']['tpu']['nodeSpec'][0]['nodeid'] = 'run1'
  with pytest.raises(UserError, match='not a request.*"nodeid"'):
    queued.from_json(value)
  with pytest.raises(ValueError, match='Unknown field for Node'):
    tpu_v2.Node(acceleratorType='v5litepod-16')
  assert tpu.calls == []


def test_submitted_seen_and_deleted(tpu, cloud):
  request = queued.build(spec(), 'run1', '#!script')
  assert cloud.state(NAME) == ('ABSENT', '')
  cloud.make_room(NAME)
  cloud.create(queued.from_json(queued.to_json(request)))
  assert tpu.requests == [request]
  assert [cloud.state(NAME)[0] for _ in range(4)] == [
    'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE', 'ACTIVE',
  ]  # fmt: skip
  with pytest.raises(UserError, match='is there and ACTIVE; watch it, or del'):
    cloud.make_room(NAME)
  with pytest.raises(UserError, match=r'refuses \(AlreadyExists\)'):
    cloud.create(request)
  cloud.delete(NAME)
  cloud.delete(NAME)
  assert cloud.state(NAME) == ('ABSENT', '')
  assert ('force delete', NAME) in tpu.calls


@pytest.mark.parametrize(
  'code, match',
  [
    (grpc.StatusCode.PERMISSION_DENIED, r'refuses \(PermissionDenied\): first'),
    (grpc.StatusCode.INVALID_ARGUMENT, r'refuses \(InvalidArgument\): first'),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, r'refuses \(ResourceExhausted\)'),
    (grpc.StatusCode.NOT_FOUND, r'refuses \(NotFound\): first'),
    (grpc.StatusCode.UNAUTHENTICATED, 'no credentials.*gcloud auth app'),
  ],
)
def test_refusals_are_one_line(tpu, cloud, code, match):
  tpu.refuse['CreateQueuedResource'] = code, 'first line\nsecond line'
  with pytest.raises(UserError, match=match) as refusal:
    cloud.create(queued.build(spec(), 'run1', ''))
  assert '\n' not in str(refusal.value)


def test_no_credentials(monkeypatch):
  def none(*unused, **unused_too):
    raise DefaultCredentialsError('none were found.\nSee the manual.')

  monkeypatch.setattr('google.auth.default', none)
  with pytest.raises(UserError, match='no credentials .*none were found'):
    queued.Cloud()


class Pause:
  """What happens to a run while `watch` waits; each in its turn."""

  def __init__(self, run, *events):
    self._run, self._events = run, list(events)

  def __call__(self):
    event = self._events.pop(0)
    if callable(event):
      return event()
    role, state = event
    if role:
      identity.tell(self._run, role, state, 'train', 'its log says why')


def launched(tmp_path, cloud, **specs):
  """The folder and the request of a run, sent."""
  run = epath.Path(tmp_path)
  requests = {
    role: queued.to_json(queued.build(spec(), name, f'#!{role}'))
    for role, name in specs.items()
  }
  identity.begin(run, tuple(requests))
  for request in requests.values():
    cloud.create(queued.from_json(request))
  return run, {'keep': False, 'requests': requests}


def test_machines_that_are_taken_away_are_asked_for_again(
  tpu, cloud, tmp_path, capsys
):
  tpu.scripts = [
    (*USUAL, State.SUSPENDING, State.SUSPENDED),
    (State.WAITING_FOR_RESOURCES, State.FAILED),
  ]
  run, launch = launched(tmp_path, cloud, trainer='run1')
  waits = [(None, None)] * 5 + [('trainer', 'running')] * 4
  follow(run, launch, cloud, Pause(run, *waits, ('trainer', 'finished')))
  assert [name for name, _ in tpu.calls] == ['create', 'force delete'] * 3
  assert len(tpu.requests) == 3
  assert all(request == tpu.requests[0] for request in tpu.requests)
  told = capsys.readouterr().out
  assert 'machines SUSPENDED' in told and 'machines FAILED (no cap' in told
  assert told.count('asked for again') == 2
  assert 'trainer: finished' in told


def test_a_run_that_ended_while_nobody_looked_is_not_begun_again(
  tpu, cloud, tmp_path
):
  tpu.scripts = [(State.SUSPENDED,)]
  run, launch = launched(tmp_path, cloud, trainer='run1')
  identity.tell(run, 'trainer', 'finished', 'evaluate', None)
  follow(run, launch | {'keep': True}, cloud, Pause(run))
  assert tpu.calls == [('create', NAME)]


def test_a_step_that_failed_ends_the_watch(tpu, cloud, tmp_path):
  run, launch = launched(tmp_path, cloud, trainer='run1', evaluator='run1-eval')
  events = ('trainer', 'failed'), ('evaluator', 'failed')
  with pytest.raises(UserError, match='trainer of .* failed at train: its log'):
    follow(run, launch, cloud, Pause(run, *events))
  gone = [name for call, name in tpu.calls if call == 'force delete']
  assert gone == [NAME, f'{NAME}-eval']


def test_machines_that_nobody_can_have(tpu, cloud, tmp_path):
  tpu.scripts = [(State.FAILED,)] * 9
  run, launch = launched(tmp_path, cloud, trainer='run1')
  with pytest.raises(UserError, match='failed 5 times .no capacity'):
    follow(run, launch, cloud, Pause(run, *[(None, None)] * 9))
  assert len(tpu.requests) == 5


def test_a_run_that_was_deleted_stays_away(tpu, cloud, tmp_path):
  run, launch = launched(tmp_path, cloud, trainer='run1')
  cloud.delete(NAME)
  identity.tell(run, 'trainer', 'deleted', None, None)
  follow(run, launch, cloud, Pause(run))
  assert len(tpu.requests) == 1


def test_what_a_watch_asked_for_while_the_run_was_deleted_goes(
  tpu, cloud, tmp_path
):
  run, launch = launched(tmp_path, cloud, trainer='run1')
  tpu.become(NAME, State.SUSPENDED)
  create = cloud.create

  def deleted_before(request):
    identity.tell_deleted(run, ('trainer',))
    create(request)

  cloud.create = deleted_before
  follow(run, launch | {'keep': True}, cloud, Pause(run, (None, None)))
  assert not tpu.live()


def test_a_watch_ends_when_the_run_was_submitted_elsewhere(
  tpu, cloud, tmp_path
):
  run, launch = launched(tmp_path, cloud, trainer='run1')
  elsewhere = queued.to_json(
    queued.build(spec(zone='us-east1-c'), 'run1', '#!trainer')
  )

  def submit():
    new = launch | {'requests': {'trainer': elsewhere}}
    identity.write_json(run / 'launch.json', new)
    cloud.create(queued.from_json(elsewhere))

  identity.write_json(run / 'launch.json', launch)
  with pytest.raises(UserError, match='submitted again; watch it anew'):
    follow(run, launch, cloud, Pause(run, submit))
  assert [*tpu.live()] == [queued.full_name(elsewhere)]


@pytest.mark.parametrize('hours, most', [(None, 5), (2, 1)])
def test_requests_that_were_to_wait_so_long_are_not_sent_again(
  tpu, cloud, tmp_path, hours, most
):
  tpu.scripts = [(State.FAILED,)] * 9
  request = queued.to_json(queued.build(spec(valid_hours=hours), 'run1', ''))
  cloud.create(queued.from_json(request))
  launch = {'keep': False, 'requests': {'trainer': request}}
  run = epath.Path(tmp_path)
  with pytest.raises(UserError, match='failed '):
    follow(run, launch, cloud, Pause(run, *[(None, None)] * 9))
  assert len(tpu.requests) == most


def test_a_watch_outlives_what_fails_for_a_moment(
  tpu, cloud, tmp_path, capsys, monkeypatch
):
  run, launch = launched(tmp_path, cloud, trainer='run1')

  def gone(code=grpc.StatusCode.UNAVAILABLE):
    tpu.refuse['GetQueuedResource'] = code, 'the network is gone'

  def there_but_late():
    tpu.refuse.clear()
    monkeypatch.setattr(tpu.client, 'get_queued_resource', late)

  def late(**unused):
    monkeypatch.undo()
    raise RetryError('timed out', None)

  def no_bucket():
    (tmp_path / 'state/trainer.json').unlink()
    (tmp_path / 'state/trainer.json').mkdir()

  def finish():
    (tmp_path / 'state/trainer.json').rmdir()
    identity.tell(run, 'trainer', 'finished', 'train', None)

  nothing = (None, None)
  events = gone, *[nothing] * 9, there_but_late, nothing, no_bucket, finish
  follow(run, launch, cloud, Pause(run, *events))
  said = capsys.readouterr().out
  unavailable = 'refuses (ServiceUnavailable): the network is gone; asking'
  assert said.count(unavailable) == said.count('asking again') - 2 == 1
  assert 'refuses (RetryError): timed out; asking again' in said
  assert 'cannot read' in said
  assert len(tpu.requests) == 1


@pytest.mark.parametrize(
  'code, rounds',
  [
    (grpc.StatusCode.UNAVAILABLE, 19),
    (grpc.StatusCode.PERMISSION_DENIED, 0),
    (grpc.StatusCode.INVALID_ARGUMENT, 0),
    (grpc.StatusCode.UNAUTHENTICATED, 0),
  ],
)
def test_a_watch_gives_up(tpu, cloud, tmp_path, code, rounds):
  run, launch = launched(tmp_path, cloud, trainer='run1')
  tpu.refuse['GetQueuedResource'] = code, 'no'
  pause = Pause(run, *[(None, None)] * 30)
  with pytest.raises(UserError):
    follow(run, launch, cloud, pause)
  assert 30 - len(pause._events) == rounds
