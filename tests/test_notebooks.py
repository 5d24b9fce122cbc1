"""The notebooks, from top to bottom, in kernels of this very Python."""

import html
import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
import tempfile
import types

import jax
import nbformat
import numpy as np
import pytest
from etils import epath
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from gsae_jax import config as config_lib
from gsae_jax.activations.store import open_store
from gsae_jax.evaluation import pareto, records
from gsae_jax.mesh import make_mesh
from gsae_jax.sae import make_module
from gsae_jax.training.checkpoints import Checkpoints
from gsae_jax.training.groups import make_groups
from gsae_jax.training.run import Run
from tests.support.fake_gcs import Blob, FakeGCS
from tests.support.locations import ROOT

NOTEBOOKS = ROOT / 'notebooks'

# Of smoke, what compiles fastest; features and batches are over four devices.
TINY = """
from experiments import smoke

def get_config():
  c = smoke.get_config()
  c.sites = ('mlp_out.0',)
  c.train.sparse = 'never'
  c.train.checkpoint_every = 40
  c.train.writers = ()
  c.eval.dashboards = 'none'
  c.mesh.data, c.mesh.model = 2, 2
  c.saes = tuple(s | {'name': f'g{l1}', 'l1': l1}
                 for s in c.saes[:1] for l1 in (0.1, 0.3))
  return c
"""
MEMBER, STEP = 'g0.3', 40

# Behind the notebook's last cell: what it found, for a test to look at.
KEEP = """
np.savez(
  os.environ['KEPT'], ids=ids, x=x, f=f, x_hat=x_hat,
  feature=feature, likelier=likelier, strength=strength,
  logits=logits, logits_without=logits_without, logits_more=logits_more,
  x_without=x_without, x_more=x_more,
  devices=[str(d) for d in jax.devices()],
)
"""


class _ThisPython(AsyncKernelManager):
  """No kernel that is installed for all of the machine."""

  @property
  def kernel_spec(self):
    launch = [sys.executable, '-m', 'ipykernel_launcher']
    return KernelSpec(argv=[*launch, '-f', '{connection_file}'])


def read(name):
  return nbformat.read(NOTEBOOKS / f'{name}.ipynb', as_version=4)


def execute(name, *, devices, more='', **environment):
  """Runs a notebook, and a cell behind its last.

  Args:
    name: of the notebook.
    devices: fake ones.
    more: the last cell.
    **environment: of the kernel, beside this process's.

  Returns:
    what each cell printed and showed, by its name.
  """
  notebook = read(name)
  cells = {c['id']: c for c in notebook.cells if c['cell_type'] == 'code'}
  notebook.cells.append(nbformat.v4.new_code_cell(more))
  environment |= {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
  }
  with (
    tempfile.TemporaryDirectory(prefix='kernel-') as own,
    pytest.MonkeyPatch.context() as patch,
  ):
    patch.setenv('JUPYTER_RUNTIME_DIR', own)
    patch.setenv('IPYTHONDIR', own)
    NotebookClient(
      notebook,
      kernel_manager_class=_ThisPython,
      resources={'metadata': {'path': str(NOTEBOOKS)}},
      timeout=300,
      startup_timeout=300,
    ).execute(env=os.environ | environment)
  return {cell: ''.join(map(_shown, c['outputs'])) for cell, c in cells.items()}


def _shown(output):
  if output['output_type'] == 'stream':
    assert output['name'] == 'stdout', output['text']  # Nobody was warned.
    return output['text']
  return output['data'].get('text/html', '')


@pytest.fixture(scope='module')
def walked(tmp_path_factory):
  """A store and a run over four devices, and what the notebook showed of them."""
  folder = tmp_path_factory.mktemp('walked')
  config = folder / 'tiny.py'
  config.write_text(TINY)
  printed = execute(
    'harvest_to_report', devices=4, CONFIG=str(config), OUT=str(folder)
  )
  return folder, printed


def trained(folder):
  """Parameters as training holds them: over its four devices, folded."""
  config = runpy.run_path(str(folder / 'tiny.py'))['get_config']()
  config = config_lib.parse(config)
  store = open_store(str(folder / 'store'))
  mesh = make_mesh(config.mesh.data, config.mesh.model)
  run = Run(
    make_groups(config.saes, config.train, store, mesh, config.seed), store
  )
  with Checkpoints(str(folder / 'run'), read_only=True) as checkpoints:
    run.restore(checkpoints, STEP)
  (about,) = (m for m in run.describe() if m['name'] == MEMBER)
  return make_module(about), run.checkpoint()['members'][MEMBER]['params']


@pytest.mark.integration
def test_from_harvest_to_report(walked):
  folder, printed = walked
  workdir = epath.Path(folder / 'run')
  assert f'4096 rows of mlp_out.0 in {folder}/store' in printed['harvest']
  assert f'step {STEP} of {STEP}, 2 SAEs' in printed['train']
  evaluations = records.read_evaluations(workdir)
  assert evaluations.keys() == {0, STEP}
  assert [r['member'] for r in evaluations[STEP]] == ['g0.1', MEMBER]
  report = (workdir / 'report.html').read_text()
  assert html.escape(report) in printed['show_report']
  table = pareto.table(evaluations[STEP])
  assert printed['evaluate'].rstrip() == printed['table'].rstrip() == table


@pytest.mark.integration
def test_restored_on_one_device_from_a_bucket(walked, embedded, tmp_path):
  folder, _ = walked
  kept = tmp_path / 'kept.npz'
  with FakeGCS(buckets=('bucket',)) as fake:
    for path in (folder / 'run').rglob('*'):
      if path.is_file():
        blob = Blob(path.read_bytes(), generation=1)
        fake.objects['bucket'][str(path.relative_to(folder))] = blob
    printed = execute(
      'restore_in_colab',
      devices=1,
      more=KEEP,
      WORKDIR='gs://bucket/run',
      MEMBER=MEMBER,
      KEPT=str(kept),
      **fake.environment,
    )
  got = dict(np.load(kept))
  assert len(got['devices']) == 1
  apply = jax.jit(embedded.module.apply, static_argnames='sites')
  logits, taken = apply(
    {'params': embedded.params}, got['ids'], sites=('mlp_out.0',)
  )
  np.testing.assert_allclose(got['logits'], logits, atol=1e-4)
  np.testing.assert_allclose(got['x'], taken['mlp_out.0'], atol=1e-5)

  module, params = trained(folder)
  assert params['W_dec'].sharding.shard_shape((64, 128)) == (32, 128)
  params = jax.device_put(jax.device_get(params), jax.devices()[0])
  out = jax.jit(module.apply)({'params': params}, got['x'])
  assert len(out['x_hat'].devices()) == 1 and np.abs(out['x_hat']).max() > 1
  np.testing.assert_array_equal(got['f'], out['f'])
  np.testing.assert_array_equal(got['x_hat'], out['x_hat'])

  check_edits(got, np.asarray(params['W_dec'], np.float64))
  shown = printed['top_features'].splitlines()
  assert len(shown) == got['ids'].size - 1  # All but BOS.
  strongest = got['f'][0, 1].argmax()
  assert shown[0].split()[:2] == ["'import'", f'{strongest}:']
  last = records.read_records(
    records.records_path(epath.Path(folder / 'run'), STEP)
  )
  assert printed['frontier'].startswith(pareto.table(last))
  points = re.findall(r'title&gt;(g0\.\d): L1 ', printed['frontier'])
  assert set(points) == {r['member'] for r in last}


def check_edits(got, W_dec_FD):
  """The feature is gone, or is stronger, and nothing else of x is changed."""
  direction_D = W_dec_FD[got['feature']]
  f_L = got['f'][0, 1:, got['feature']]
  assert f_L.max() == got['f'][0, 1:].max() > 1 and (f_L == 0).any()
  for name, amount_L in (
    ('without', -f_L),
    ('more', np.full_like(f_L, got['strength'])),
  ):
    moved_LD = got[f'x_{name}'][0].astype(np.float64) - got['x'][0]
    assert not moved_LD[0].any()  # BOS.
    assert not moved_LD[1:][amount_L == 0].any()
    np.testing.assert_allclose(
      moved_LD[1:], amount_L[:, None] * direction_D, atol=1e-5
    )
    effect_LV = got[f'logits_{name}'][0] - got['logits'][0]
    first = 1 + np.flatnonzero(amount_L)[0]
    assert np.abs(effect_LV[:first]).max() < 1e-4  # It sees what was.
    assert np.abs(effect_LV[first]).max() > 0.1
    # Its own tokens are those that it makes likelier, and the other way round.
    own_L = effect_LV[:, got['likelier']].mean(1) - effect_LV.mean(1)
    sign_L = np.sign(amount_L)
    np.testing.assert_array_equal(
      np.sign(own_L[1:])[sign_L != 0], sign_L[sign_L != 0]
    )


@pytest.fixture
def colab(monkeypatch):
  """As if this were Colab; which commands were run, and what is installed."""
  ran, installed = [], {'jax': '0.7.2', 'numpy': '2.1.3', 'pip': '24.1'}
  module = types.ModuleType('google.colab')
  module.auth = types.SimpleNamespace(
    authenticate_user=lambda: ran.append('authenticate')
  )
  monkeypatch.setitem(sys.modules, 'google.colab', module)
  monkeypatch.setattr(
    importlib.metadata,
    'distributions',
    lambda: [
      types.SimpleNamespace(name=k, version=v) for k, v in installed.items()
    ],
  )

  def run(command, check):
    assert check
    ran.append([str(part) for part in command])

  monkeypatch.setattr(subprocess, 'run', run)
  return ran, installed


def cell(name, notebook):
  (found,) = (c for c in read(notebook).cells if c['id'] == name)
  return found['source']


def test_colab_keeps_its_jax(colab, monkeypatch):
  ran, installed = colab
  install = cell('install', 'restore_in_colab')
  given = {'REPOSITORY': 'https://host/gsae.git', 'WORKDIR': 'gs://b/run'}
  exec(install, dict(given))
  wanted = 'gsae_jax[gcs] @ git+https://host/gsae.git'
  pip = [sys.executable, '-m', 'pip', 'install', '-q', wanted]
  assert ran == [pip, 'authenticate']
  exec(install, given | {'WORKDIR': 'run'})
  assert ran == [pip, 'authenticate', pip]

  def moves(command, check):
    installed.update(jax='0.10.2', pip='25.0')

  monkeypatch.setattr(subprocess, 'run', moves)
  with pytest.raises(AssertionError, match='pip moved jax 0.7.2; take a new'):
    exec(install, dict(given))
  with pytest.raises(AssertionError, match='set REPOSITORY, above'):
    exec(install, given | {'REPOSITORY': ''})


def test_colab_clones_the_experiments(colab, monkeypatch, tmp_path):
  ran, _ = colab
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'gsae_jax').mkdir()
  url = 'https://host/gsae.git'
  given = {'os': os, 'REPOSITORY': url, 'OUT': 'gs://b/run'}
  exec(cell('install', 'harvest_to_report'), given)
  root = tmp_path / 'gsae_jax'
  assert ran == [
    ['git', 'clone', '-q', url, str(root)],
    [sys.executable, '-m', 'pip', 'install', '-q', f'{root}[gcs]'],
    'authenticate',
  ]
  assert os.getcwd() == str(root)


def test_notebooks_are_kept_without_outputs():
  found = sorted(NOTEBOOKS.glob('*.ipynb'))
  assert len(found) == 2
  for path in found:
    notebook = read(path.stem)
    nbformat.validate(notebook)
    for c in notebook.cells:
      if c['cell_type'] == 'code':
        assert c['outputs'] == [] and c['execution_count'] is None, (path, c)
    tagged = [
      c for c in notebook.cells if 'parameters' in c.metadata.get('tags', ())
    ]
    assert [c['id'] for c in tagged] == ['parameters']
