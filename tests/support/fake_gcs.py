"""Google Cloud Storage in memory, on loopback: as much as our clients ask.

    with FakeGCS(buckets=('acts',)) as fake:
      subprocess.run(command, env=os.environ | fake.environment, check=True)
      fake.objects['acts']['x/c/0'].data = b'damaged'
      assert ('GET media', 'x/zarr.json') in fake.requests

The clients (TensorStore; gcsfs under epath; google-cloud-storage, under Orbax)
read the environment once, some while they are imported: hence the subprocess.
"""

import contextlib
import dataclasses
import itertools
import json
import re
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

Reply = tuple[int, dict[str, str], bytes]  # Status, headers, body.


@dataclasses.dataclass
class Blob:
  data: bytes  # Assign to it to damage an object: its generation stays.
  generation: int
  updated: str = dataclasses.field(
    default_factory=lambda: time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())
  )


class _Refused(Exception):
  """An answer that is an error: status, message."""


class FakeGCS(ThreadingHTTPServer):
  """Serves while it is entered; `objects` and `requests` stay.

  Attributes:
    objects: by bucket and name.
    closed: buckets that may be read and not be written.
    accounts: what requests had under Authorization.
    requests: (kind, object's name or listed prefix), in order. The kinds are
      'GET bucket', 'GET list', 'GET media', 'GET metadata', 'DELETE object',
      'POST upload' (the start of a resumable one, too, and each chunk of it),
      'POST moveTo', 'POST rewriteTo', 'POST copyTo' and 'POST batch'.
  """

  daemon_threads = False  # Closing waits for those that are not.
  request_queue_size = 128

  def __init__(self, buckets: Iterable[str]):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.url = f'http://127.0.0.1:{self.server_port}'
    self.objects: dict[str, dict[str, Blob]] = {b: {} for b in buckets}
    self.closed: set[str] = set()
    self.accounts: set[str | None] = set()
    self.requests: list[tuple[str, str]] = []
    self._numbers = itertools.count(1)  # Of generations, and of uploads.
    self._uploads = {}  # By number: name, query, what has come.
    self._lock = threading.RLock()
    self._connections = weakref.WeakSet()
    self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))

  def __enter__(self):
    self._thread.start()
    return self

  def __exit__(self, *unused):
    self.shutdown()
    self._thread.join()
    for connection in self._connections:  # Clients keep them alive.
      with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    self.server_close()

  def process_request(self, request, client_address):
    self._connections.add(request)
    super().process_request(request, client_address)

  def handle_error(self, request, client_address):
    if not isinstance(sys.exception(), ConnectionError):  # A client's death.
      super().handle_error(request, client_address)

  @property
  def environment(self) -> dict[str, str]:
    """What leads the clients here, without credentials."""
    return {
      'TENSORSTORE_GCS_HTTP_URL': self.url,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'x',
      'STORAGE_EMULATOR_HOST': self.url,
      'FSSPEC_GCS': '{"token": "anon"}',
      'NO_GCE_CHECK': 'true',
      # Else gcsfs asks Google over gRPC what kind of bucket each is.
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    }

  def answer(self, method: str, target: str, headers, body: bytes) -> Reply:
    """Answers one request; they take turns."""
    with self._lock:
      self.accounts.add(headers.get('Authorization'))
      try:
        return self._answer(method, target, headers, body)
      except _Refused as e:
        status, message = e.args
        return _json({'error': {'code': status, 'message': message}}, status)

  def _answer(self, method, target, headers, body) -> Reply:
    url = urlsplit(target)
    query = dict(parse_qsl(url.query))
    # An object's name is one part of the path: its slashes come as %2F.
    service, _, path = url.path.partition('storage/v1')
    parts = [unquote(part) for part in path.split('/')[1:]]
    note = lambda kind, name='': self.requests.append((kind, name))
    if method != 'GET' and parts[1:2] and parts[1] in self.closed:
      raise _Refused(403, f'the caller has no right to write to {parts[1]}')
    match method, service, *parts:
      case 'GET', '/', 'b', bucket:
        note('GET bucket')
        self._bucket(bucket)
        return _json({'kind': 'storage#bucket', 'id': bucket, 'name': bucket})
      case 'GET', '/', 'b', bucket, 'o':
        note('GET list', query.get('prefix', ''))
        return self._list(bucket, query)
      case 'GET', '/' | '/download/', 'b', bucket, 'o', name:
        media = service != '/' or query.get('alt') == 'media'
        note('GET media' if media else 'GET metadata', name)
        blob = self._find(bucket, name, query)
        if media:
          return _media(blob, headers.get('Range', ''))
        return _json(_resource(bucket, name, blob))
      case 'DELETE', '/', 'b', bucket, 'o', name:
        note('DELETE object', name)
        self._find(bucket, name, query)
        del self.objects[bucket][name]
        return 204, {}, b''
      case 'POST', '/', 'b', bucket, 'o', name, verb, *to_bucket, 'o', to:
        note(f'POST {verb}', name)
        blob = self._find(bucket, name, {})
        resource = self._write([bucket, *to_bucket][-1], to, blob.data, query)
        if verb == 'moveTo':
          del self.objects[bucket][name]
        if verb != 'rewriteTo':
          return _json(resource)
        size = resource['size']
        sizes = {'objectSize': size, 'totalBytesRewritten': size}
        return _json({'done': True, 'resource': resource} | sizes)
      case 'POST' | 'PUT', '/upload/', 'b', bucket, 'o':
        return self._upload(bucket, target, query, headers, body)
      case 'POST', '/batch/':
        note('POST batch')
        return self._batch(body)
    # Not 404, which clients take for an answer, nor 5xx: they would try again
    # for half a minute.
    raise _Refused(400, f'the fake does not know {method} {target}')

  def _bucket(self, name: str) -> dict[str, Blob]:
    if name not in self.objects:
      raise _Refused(404, f'No such bucket: {name}')
    return self.objects[name]

  def _find(self, bucket: str, name: str, query) -> Blob:
    blob = self._bucket(bucket).get(name)
    if not blob or query.get('generation') not in (None, str(blob.generation)):
      raise _Refused(404, f'No such object: {bucket}/{name}')
    _check_generation(blob, query)
    return blob

  def _write(self, bucket: str, name: str, data: bytes, query) -> dict:
    """Makes a new generation of an object; returns its resource."""
    _check_generation(self._bucket(bucket).get(name), query)
    blob = self.objects[bucket][name] = Blob(bytes(data), next(self._numbers))
    return _resource(bucket, name, blob)

  def _list(self, bucket: str, query) -> Reply:
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    start = query.get('startOffset', '')
    end = query.get('endOffset', chr(sys.maxunicode))
    found = {}  # The objects, and None for each prefix.
    for name, blob in sorted(self._bucket(bucket).items()):
      if name.startswith(prefix) and start <= name < end:
        head, cut, _ = name[len(prefix) :].partition(delimiter or '\0')
        found[prefix + head + cut] = None if cut else blob
    left = [n for n in found if n > query.get('pageToken', '')]
    page = left[: min(int(query.get('maxResults', 1000)), 1000)]
    reply = {
      'kind': 'storage#objects',
      'items': [_resource(bucket, n, found[n]) for n in page if found[n]],
      'prefixes': [n for n in page if not found[n]],
    }
    if page != left:
      reply['nextPageToken'] = page[-1]
    return _json(reply)

  def _upload(self, bucket: str, target: str, query, headers, body) -> Reply:
    self._bucket(bucket)
    if 'upload_id' in query:
      return self._chunk(bucket, query['upload_id'], headers, body)
    name = query.get('name')
    if query['uploadType'] == 'multipart':
      resource, body = _multipart(headers['Content-Type'], body)
      name = resource.get('name', name)
    elif query['uploadType'] == 'resumable':
      name = name or json.loads(body)['name']
    self.requests.append(('POST upload', name))
    if query['uploadType'] != 'resumable':
      return _json(self._write(bucket, name, body, query))
    upload_id = str(next(self._numbers))
    self._uploads[upload_id] = name, query, bytearray()
    location = f'http://{headers["Host"]}{target}&upload_id={upload_id}'
    return 200, {'Location': location}, b''

  def _chunk(self, bucket: str, upload_id: str, headers, body) -> Reply:
    if upload_id not in self._uploads:
      raise _Refused(410, f'No such upload: {upload_id}')
    name, query, data = self._uploads[upload_id]
    self.requests.append(('POST upload', name))
    chunk = headers.get('Content-Range', f'bytes 0-/{len(body)}')
    # Without a first byte there are none: it asks, or says, how many came.
    first, total = re.fullmatch(r'bytes (?:(\d+)-\d*|\*)/(.+)', chunk).groups()
    if first:
      data[int(first) :] = body
    if total != str(len(data)):
      return 308, {'Range': f'bytes=0-{len(data) - 1}'} if data else {}, b''
    del self._uploads[upload_id]
    return _json(self._write(bucket, name, data, query))

  def _batch(self, body: bytes) -> Reply:
    parts = []
    for line in re.findall(r'^(\w+ \S+) HTTP/', body.decode(), re.MULTILINE):
      status, _, content = self.answer(*line.split(), {}, b'')
      parts.append(
        '--batch\r\nContent-Type: application/http\r\n\r\n'
        f'HTTP/1.1 {status} -\r\nContent-Type: application/json\r\n\r\n'
        f'{content.decode()}\r\n'
      )
    headers = {'Content-Type': 'multipart/mixed; boundary=batch'}
    return 200, headers, ''.join([*parts, '--batch--']).encode()


def _json(value, status: int = 200) -> Reply:
  headers = {'Content-Type': 'application/json'}
  return status, headers, json.dumps(value).encode()


def _resource(bucket: str, name: str, blob: Blob) -> dict[str, str]:
  return {
    'kind': 'storage#object',
    'bucket': bucket,
    'name': name,
    'generation': str(blob.generation),
    'metageneration': '1',
    'size': str(len(blob.data)),
    'timeCreated': blob.updated,
    'updated': blob.updated,
  }


def _check_generation(blob: Blob | None, query) -> None:
  generation = str(blob.generation) if blob else '0'
  if query.get('ifGenerationMatch', generation) != generation:
    raise _Refused(412, 'the object has another generation')
  if query.get('ifGenerationNotMatch') == generation:
    raise _Refused(304, 'the object has this generation')


def _media(blob: Blob, wanted: str) -> Reply:
  headers = {'x-goog-generation': str(blob.generation)}
  match = re.fullmatch(r'bytes=(\d*)-(\d*)', wanted)
  if not match:
    return 200, headers, blob.data
  first, last = match.groups()
  size = len(blob.data)
  if first:
    start, stop = int(first), min(int(last or size) + 1, size)
  else:  # The last so many bytes.
    start, stop = max(size - int(last), 0), size
  if start >= stop:
    raise _Refused(416, 'the range cannot be satisfied')
  headers['Content-Range'] = f'bytes {start}-{stop - 1}/{size}'
  return 206, headers, blob.data[start:stop]


def _multipart(content_type: str, body: bytes) -> tuple[dict, bytes]:
  """Returns the object's resource and its data, each of which is a part.

  The standard library's parser is one of text, and gcsfs ends lines with LF.
  """
  delimiter = b'--' + re.search('boundary="?([^";]+)', content_type)[1].encode()
  newline = b'\r\n' if body.startswith(delimiter + b'\r\n') else b'\n'
  _, resource, data = body.split(delimiter, 2)
  data = data.split(newline * 2, 1)[1].rpartition(newline + delimiter)[0]
  return json.loads(resource.split(newline * 2, 1)[1]), data


class _Handler(BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True

  def _serve(self):
    if self.headers.get('Transfer-Encoding') == 'chunked':
      body = b''.join(iter(self._chunk, b''))
    else:
      body = self._read(int(self.headers.get('Content-Length', 0)))
    status, headers, content = self.server.answer(
      self.command, self.path, self.headers, body
    )
    if status in (204, 304):  # Which have no body.
      content = b''
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    self.wfile.write(content)

  do_DELETE = do_GET = do_POST = do_PUT = _serve

  def _chunk(self) -> bytes:
    data = self._read(int(self.rfile.readline(), 16))
    self._read(2)  # The end of the line.
    return data

  def _read(self, size: int) -> bytes:
    data = self.rfile.read(size)
    if len(data) < size:  # Its client died: nothing is to be written.
      raise ConnectionError
    return data

  def log_message(self, *unused):
    pass
