"""Cloud TPU's service on loopback, made of the client's own types.

The client ships no servicer, so methods are registered by their names.
"""

import contextlib
from concurrent import futures

import grpc
from google.cloud import tpu_v2
from google.cloud.tpu_v2.services.tpu import transports
from google.longrunning import operations_pb2
from google.protobuf import any_pb2, empty_pb2

State = tpu_v2.QueuedResourceState.State
# What a request goes through, a state at each look.
USUAL = (State.WAITING_FOR_RESOURCES, State.PROVISIONING, State.ACTIVE)


class FakeTpu:
  """Keeps requests, and gives each the states of a script.

  Attributes:
    calls: (method, name), in order.
    requests: all that were created, in order.
    scripts: states of the next requests, one script for each; then USUAL.
    refuse: a method's name and the error that it gives instead.
    deleting: states that a deleted request has, a state at each look, until it
      is gone.
  """

  def __init__(self):
    self.calls, self.requests, self.scripts, self.refuse = [], [], [], {}
    self.deleting = ()
    self._states = {}  # By name: those that are to come; the last stays.
    methods = {
      'CreateQueuedResource': (
        self._create,
        tpu_v2.CreateQueuedResourceRequest,
      ),
      'GetQueuedResource': (self._get, tpu_v2.GetQueuedResourceRequest),
      'DeleteQueuedResource': (
        self._delete,
        tpu_v2.DeleteQueuedResourceRequest,
      ),
    }
    handlers = {
      name: grpc.unary_unary_rpc_method_handler(
        self._guarded(name, answer),
        request_deserializer=kind.deserialize,
        response_serializer=lambda reply: (
          reply.SerializeToString()
          if isinstance(reply, operations_pb2.Operation)
          else type(reply).serialize(reply)
        ),
      )
      for name, (answer, kind) in methods.items()
    }
    self._server = grpc.server(futures.ThreadPoolExecutor(1))
    self._server.add_generic_rpc_handlers(
      (
        grpc.method_handlers_generic_handler(
          'google.cloud.tpu.v2.Tpu', handlers
        ),
      )
    )
    port = self._server.add_insecure_port('127.0.0.1:0')
    self._server.start()
    self._channel = grpc.insecure_channel(f'127.0.0.1:{port}')
    self.client = tpu_v2.TpuClient(
      transport=transports.TpuGrpcTransport(channel=self._channel)
    )

  def live(self) -> dict[str, State]:
    """Returns the requests that are there, with the states they have now."""
    found = {name: states[0] for name, states in self._states.items()}
    return {name: state for name, state in found.items() if state is not None}

  def become(self, name: str, *states: State) -> None:
    """Gives a request other states to go through; none takes it away."""
    self._states.pop(name, None)
    if states:
      self._states[name] = list(states)

  def close(self) -> None:
    self._channel.close()
    self._server.stop(None).wait()

  def _guarded(self, name, answer):
    def reply(request, context):
      if name in self.refuse:
        context.abort(*self.refuse[name])
      return answer(request, context)

    return reply

  def _create(self, request, context):
    name = f'{request.parent}/queuedResources/{request.queued_resource_id}'
    self.calls.append(('create', name))
    if name in self._states:
      context.abort(grpc.StatusCode.ALREADY_EXISTS, f'{name} exists')
    self.requests.append(request)
    self._states[name] = list(self.scripts.pop(0) if self.scripts else USUAL)
    resource = tpu_v2.QueuedResource(name=name)
    return _operation(tpu_v2.QueuedResource.pb(resource))

  def _get(self, request, context):
    states = self._states.get(request.name)
    if not states:
      context.abort(grpc.StatusCode.NOT_FOUND, f'{request.name} is not there')
    state = states.pop(0) if len(states) > 1 else states[0]
    if state is None:  # It was deleted.
      self.become(request.name)
      context.abort(grpc.StatusCode.NOT_FOUND, f'{request.name} is not there')
    resource = tpu_v2.QueuedResource(
      name=request.name, state=tpu_v2.QueuedResourceState(state=state)
    )
    if state == State.FAILED:
      resource.state.failed_data.error.message = 'no capacity\nat all'
    return resource

  def _delete(self, request, context):
    self.calls.append(
      ('force delete' if request.force else 'delete', request.name)
    )
    if request.name not in self._states:
      context.abort(grpc.StatusCode.NOT_FOUND, f'{request.name} is not there')
    self.become(request.name)
    if self.deleting:
      self._states[request.name] = [*self.deleting, None]
    return _operation(empty_pb2.Empty())


def _operation(result):
  done = any_pb2.Any()
  done.Pack(result)
  return operations_pb2.Operation(name='operation', done=True, response=done)


@contextlib.contextmanager
def fake_tpu():
  fake = FakeTpu()
  try:
    yield fake
  finally:
    fake.close()
