"""Buckets: a fake of Google's that keeps preconditions, and moto's of Amazon's.

The clients read their settings while they are imported, so everything that
talks to a bucket runs in a process that was started with that bucket's settings.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest

import gsae_jax
from tests.support.commands import files, metrics, metrics_of, refuse, run
from tests.support.fake_gcs import FakeGCS
from tests.support.locations import ROOT

pytestmark = pytest.mark.integration


@pytest.fixture(scope='module')
def gcs():
  """Google's, with a bucket `acts`, and one that is only to be read."""
  with FakeGCS(buckets=('acts', 'theirs')) as fake:
    fake.closed.add('theirs')
    yield fake


# One request at a time: moto looks at a precondition, and then writes.
S3_SERVER = """
import sys, threading
from moto.moto_server import werkzeug_app as moto
from werkzeug.serving import run_simple
app = moto.DomainDispatcherApplication(moto.create_backend_app)
lock = threading.Lock()
def one_at_a_time(environ, start_response):
  with lock:
    return list(app(environ, start_response))
run_simple('127.0.0.1', int(sys.argv[1]), one_at_a_time, threaded=True,
           request_handler=moto.MotoRequestHandler)
"""


@pytest.fixture(scope='module')
def s3():
  """Environment of a bucket `acts` on loopback."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  environment = {
    'GSAE_S3_ENDPOINT': f'http://127.0.0.1:{port}',
    'AWS_ACCESS_KEY_ID': 'any',
    'AWS_SECRET_ACCESS_KEY': 'any',
    'AWS_EC2_METADATA_DISABLED': 'true',
  }
  server = subprocess.Popen(
    [sys.executable, '-c', S3_SERVER, str(port)],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  try:
    while True:
      try:
        socket.create_connection(('127.0.0.1', port)).close()
        break
      except ConnectionRefusedError:
        assert server.poll() is None
        time.sleep(0.1)
    url = f'{environment["GSAE_S3_ENDPOINT"]}/acts'
    urllib.request.urlopen(urllib.request.Request(url, method='PUT')).close()
    yield environment
  finally:
    server.kill()
    server.wait()


def python(code, environment, argument):
  """What a piece of Python prints; its argument is a place in a bucket."""
  command = dict(package='tests.support', config=None)
  return run('snippet', argument, code, **command, **environment)


READ = """
import sys
from gsae_jax.activations import layout
kv = layout.open_kvstore(sys.argv[1])
for key in sorted(kv.list().result()):
  print(key.decode(), kv.read(key).result().value.hex())
"""


def objects(place, environment):
  """Contents by name, as `files` has them of a folder."""
  lines = python(READ, environment, place).splitlines()
  pairs = (line.rsplit(' ', 1) for line in lines)
  return {name: bytes.fromhex(value) for name, value in pairs}


def test_the_whole_line_runs_on_google_storage(smoke, gcs):
  store, workdir, table, _ = smoke
  env = gcs.environment
  place, work = 'gs://acts/a/store', 'gs://acts/a/run'
  run('harvest', f'--store={place}', **env)
  assert objects(place, env) == files(store)
  flags = (f'--store={place}', f'--workdir={work}')
  run('train', *flags, **env)
  assert run('evaluate', f'--workdir={work}', **env) == table
  printed = run('report', f'--workdir={work}', **env)
  assert printed.strip() == f'{work}/report.html'
  bucket = {
    name.removeprefix('a/run/'): blob.data
    for name, blob in gcs.objects['acts'].items()
    if name.startswith('a/run/')
  }
  local = files(workdir)
  for name, data in local.items():
    if name.startswith('eval/'):
      assert bucket[name] == data, name
  there = metrics(bucket['metrics.jsonl'].decode())
  assert there == metrics_of(workdir)
  assert b'<svg' in bucket['report.html']
  (events,) = (n for n in bucket if n.startswith('tensorboard/events'))
  assert b'gated_mlp_out.0/loss' in bucket[events]
  loaded = python(
    'import sys, gsae_jax, numpy\n'
    'sae = gsae_jax.load(sys.argv[1], member="relu_mlp_out.0")\n'
    'print(sae.metadata["step"], numpy.asarray(sae.params["W_dec"]).tolist())',
    env,
    work,
  )
  step, weights = loaded.split(' ', 1)
  want = gsae_jax.load(str(workdir), member='relu_mlp_out.0').params['W_dec']
  assert step == '40'
  np.testing.assert_array_equal(np.float32(json.loads(weights)), want)


def test_a_run_on_google_storage_goes_on_where_it_was(smoke, gcs):
  store, workdir, *_ = smoke
  env = gcs.environment
  work = 'gs://acts/b/run'
  flags = (f'--store={store}', f'--workdir={work}')
  run('train', *flags, **env)
  # As if it had been killed behind step 20.
  bucket = gcs.objects['acts']
  for name in [n for n in bucket if n.startswith('b/run/checkpoints/40')]:
    del bucket[name]
  lines = bucket['b/run/metrics.jsonl'].data
  run('train', *flags, **env)
  again = bucket['b/run/metrics.jsonl'].data
  assert metrics(again.decode()) == metrics(lines.decode())
  assert any(n.startswith('b/run/checkpoints/40/') for n in bucket)


def test_damage_on_google_storage_is_named_and_repaired(smoke, gcs, tmp_path):
  store, *_ = smoke
  env = gcs.environment
  place = 'gs://acts/c/store'
  run('harvest', f'--store={place}', **env)
  name = 'c/store/mlp_out.0/activations/c/3/0'
  data = bytearray(gcs.objects['acts'][name].data)
  data[1000] ^= 1
  gcs.objects['acts'][name].data = bytes(data)
  refuse(
    'train',
    f'--store={place}',
    f'--workdir={tmp_path}/run',
    '--config.train.steps=80',
    match='mlp_out.0/activations/c/3/0',
    **env,
  )
  run('store', 'verify', place, '--repair', **env)
  assert name not in gcs.objects['acts']
  before = len(gcs.requests)
  run('harvest', f'--store={place}', **env)
  written = [n for kind, n in gcs.requests[before:] if kind == 'POST upload']
  assert {n.split('/')[-1] for n in written} == {'0', '3', '3.json', 'manifest.json'}  # fmt: skip
  assert objects(place, env) == files(store)


def test_a_whole_shard_is_one_request(smoke, gcs):
  env = gcs.environment
  place = 'gs://acts/d/store'
  run('harvest', f'--store={place}', **env)
  code = """
import sys
from gsae_jax.activations.loader import Loader
from gsae_jax.activations.store import open_store
store = open_store(sys.argv[1])
loader = Loader(store, ('mlp_out.0',), batch_size=128, seed=0, unit='shard',
                shuffle_rows=1024)
for step in range(32):
  loader.rows_at(step, 'mlp_out.0')
"""
  before = len(gcs.requests)
  python(code, env, place)
  media = [n for kind, n in gcs.requests[before:] if kind == 'GET media']
  shards = [n for n in media if '/activations/c/' in n]
  # Eight shards, an epoch: the rows of each, and its record, once.
  assert len(shards) == len(set(shards)) == 8
  assert len([n for n in media if '/records/' in n]) == 8


def test_stores_on_s3(smoke, s3, tmp_path):
  store, workdir, table, _ = smoke
  place = 's3://acts/a/store'
  run('harvest', f'--store={place}', **s3)
  assert objects(place, s3) == files(store)
  assert '8 of 8 shards read, 0 bad' in run('store', 'verify', place, **s3)
  run('train', f'--store={place}', f'--workdir={tmp_path}', **s3)
  assert metrics_of(tmp_path) == metrics_of(workdir)
  assert run('evaluate', f'--workdir={tmp_path}', **s3) == table
  for program in ('train', 'evaluate', 'report'):
    flags = [f'--store={place}'] if program == 'train' else []
    refuse(
      program,
      *flags,
      '--workdir=s3://acts/run',
      match='checkpoints cannot be on s3://',
      **s3,
    )


def test_a_bucket_that_is_not_there_is_named(gcs, s3):
  for place, env in (('gs://nobody/x', gcs.environment), ('s3://nobody/x', s3)):
    refuse('harvest', f'--store={place}', match='--store: cannot', **env)
    refuse('store', 'inspect', place, match='nobody/x', **env)


def test_a_bucket_that_is_not_to_be_written_is_named(smoke, gcs):
  refused = 'the caller has no right to write to theirs'
  place, env = 'gs://theirs/x', gcs.environment
  refuse('harvest', f'--store={place}', match=refused, **env)
  flags = f'--store={smoke[0]}', f'--workdir={place}'
  refuse('train', *flags, match=f'{refused}; check the path', **env)
  assert not gcs.objects['theirs']


TWO_WRITERS = """
import sys
import numpy as np, tensorstore as ts
from gsae_jax.activations import layout
place, me = sys.argv[1], int(sys.argv[2])
header = dict(rows=64, shard_rows=64, chunk_rows=4, dtype='float32',
              widths={'s': 4})
spec = layout.array_specs(place, header)['s/activations']
array = ts.open(spec, create=True, open=True).result()
for start in range(4 * me, 64, 8):  # Every other chunk of the one shard.
  rows = np.full((4, 4), start + 1, np.float32)
  array[start : start + 4].write(rows).result()
"""


@pytest.mark.parametrize('kind', ['gs', 's3'])
def test_two_writers_on_one_shard_lose_no_row(kind, gcs, s3):
  env = gcs.environment if kind == 'gs' else s3
  place = f'{kind}://acts/two'
  writers = [
    subprocess.Popen(
      [sys.executable, '-c', TWO_WRITERS, place, str(me)],
      cwd=ROOT,
      env=os.environ | env,
    )
    for me in range(2)
  ]
  assert [w.wait(timeout=120) for w in writers] == [0, 0]
  code = """
import sys
from gsae_jax.activations import layout
header = dict(rows=64, shard_rows=64, chunk_rows=4, dtype='float32',
              widths={'s': 4})
spec = layout.array_specs(sys.argv[1], header)['s/activations']
print(layout.open_array(spec)[:, 0].read().result().tolist())
"""
  rows = json.loads(python(code, env, place))
  assert rows == [4 * (i // 4) + 1 for i in range(64)]
