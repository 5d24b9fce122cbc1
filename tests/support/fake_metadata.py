"""A machine's metadata server on loopback, and Cloud TPU's over REST."""

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeMetadata(ThreadingHTTPServer):
  """Attributes: `values` below computeMetadata/v1/, and other `requests`."""

  def __init__(self):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.place = f'127.0.0.1:{self.server_port}'
    self.values = {
      'instance/service-accounts/default/token': (
        '{"access_token": "ya29.a-b_c", "expires_in": 3599}'
      ),
      'instance/attributes/agent-worker-number': '0',
      'instance/preempted': 'FALSE',
      'instance/maintenance-event': 'NONE',
    }
    self.asked = []  # In order.
    self.requests = []  # Method, path, authorization, body.

  @property
  def environment(self) -> dict[str, str]:
    return {
      'GCE_METADATA_HOST': self.place,
      'CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU': f'http://{self.place}/',
    }


class _Handler(BaseHTTPRequestHandler):
  def _serve(self):
    body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
    path = self.path.removeprefix('/computeMetadata/v1/')
    if path == self.path:
      account = self.headers.get('Authorization')
      self.server.requests.append((self.command, self.path, account, body))
      value = '{"name": "projects/p/locations/z/operations/o", "done": true}'
    else:
      assert self.headers['Metadata-Flavor'] == 'Google'
      self.server.asked.append(path)
      value = self.server.values.get(path)
    self.send_response(200 if value is not None else 404)
    self.send_header('Content-Type', 'application/json')
    self.end_headers()
    self.wfile.write((value or '').encode())

  do_GET = do_POST = do_DELETE = _serve

  def log_message(self, *unused):
    pass


@contextlib.contextmanager
def fake_metadata():
  with FakeMetadata() as fake:
    thread = threading.Thread(target=fake.serve_forever, args=(0.02,))
    thread.start()
    try:
      yield fake
    finally:
      fake.shutdown()
      thread.join()
