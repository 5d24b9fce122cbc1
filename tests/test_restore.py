"""gsae_jax.load from a workdir, a checkpoint, an exported folder."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gsae_jax
from gsae_jax import restore
from gsae_jax.errors import UserError
from gsae_jax.mesh import make_mesh
from gsae_jax.sae import VARIANTS, make_module
from tests.support.dictionaries import with_gaps
from tests.support.training import member, settings, train, write_store

MEMBERS = (member('g'), member('r', architecture='relu', features=96))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A workdir trained over four devices, and its activations."""
  folder = tmp_path_factory.mktemp('run')
  store = write_store(folder / 'store')
  workdir = folder / 'workdir'
  train(store, workdir, MEMBERS, settings(steps=60), mesh=make_mesh(1, 4))
  x = store.array('resid_post.0/activations')[:400].read().result()
  # No gate is near its edge, here or where a test adds 0.1: the JumpReLU form and
  # programs for other shapes open the same ones.
  saes = [gsae_jax.load(str(workdir), member=m.name).params for m in MEMBERS]
  moved = [p | {'b_dec': p['b_dec'] - 0.1} for p in saes]
  x = with_gaps(x, 200, *saes, *moved)
  return workdir, x, store


@pytest.mark.integration
def test_encode_and_decode_are_the_papers_equations(run):
  workdir, x, _ = run
  sae = gsae_jax.load(str(workdir), member='g')
  p = {k: np.asarray(v, np.float64) for k, v in sae.params.items()}
  z = (x - p['b_dec']) @ p['W_gate']
  f = (z + p['b_gate'] > 0) * np.maximum(np.exp(p['r_mag']) * z + p['b_mag'], 0)
  np.testing.assert_allclose(sae.encode(x), f, atol=1e-4)
  np.testing.assert_allclose(
    sae.decode(f), f @ p['W_dec'] + p['b_dec'], atol=1e-4
  )
  np.testing.assert_allclose(sae(x), sae.decode(sae.encode(x)))
  error = ((sae(x) - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
  assert error < 0.4  # Raw activations: the scale is in the weights.
  assert len(sae.params['W_dec'].devices()) == 1


@pytest.mark.integration
def test_leading_axes_are_free_and_the_last_is_checked(run):
  workdir, x, _ = run
  sae = gsae_jax.load(str(workdir), member='r')
  f = sae.encode(x[:24].reshape(2, 3, 4, 16))
  assert f.shape == (2, 3, 4, 96)
  np.testing.assert_allclose(f.reshape(24, 96), sae.encode(x[:24]), atol=1e-5)
  assert sae.encode(x[0]).shape == (96,)
  with pytest.raises(ValueError, match='has 15 entries, .* width=16'):
    sae.encode(x[:, :15])
  with pytest.raises(ValueError, match='has 16 entries, .* features=96'):
    sae.decode(x)


@pytest.mark.integration
def test_what_it_says_of_itself(run):
  workdir, _, store = run
  sae = gsae_jax.load(str(workdir), member='g')
  assert sae.config['architecture'] == 'gated' and sae.config['l1'] == 0.1
  assert sae.config['site'] == 'resid_post.0' and sae.config['features'] == 64
  scale = store.sites['resid_post.0'].mean_squared_norm ** -0.5
  np.testing.assert_allclose(sae.config['scale'], scale, rtol=1e-6)
  assert sae.metadata['step'] == 60 and sae.config['seed'] == 0
  assert sae.metadata['store'] == store.content_hash
  json.dumps([sae.config, sae.metadata])
  assert repr(sae).startswith("SAE('g', architecture='gated'")
  assert set(sae.params) == {
    'W_gate', 'b_gate', 'r_mag', 'b_mag', 'W_dec', 'b_dec'
  }  # fmt: skip


@pytest.mark.integration
def test_steps_and_paths(run):
  workdir, x, _ = run
  last = gsae_jax.load(str(workdir), member='g')
  for path, step in (
    (workdir, 60),
    (workdir / 'checkpoints', None),
    (workdir / 'checkpoints' / '60', None),
  ):
    sae = gsae_jax.load(str(path), step=step, member='g')
    np.testing.assert_array_equal(sae(x), last(x))
  first = gsae_jax.load(str(workdir / 'checkpoints' / '0'), member='g')
  assert first.metadata['step'] == 0
  assert np.abs(first(x) - last(x)).max() > 0.1


@pytest.mark.integration
def test_exported_folder_is_the_same_sae(run, tmp_path):
  workdir, x, _ = run
  sae = gsae_jax.load(str(workdir), member='r')
  sae.save(str(tmp_path / 'out'))
  again = gsae_jax.load(str(tmp_path / 'out'))
  np.testing.assert_array_equal(again(x), sae(x))
  assert again.config == sae.config and again.metadata == sae.metadata
  about = json.loads((tmp_path / 'out' / 'sae.json').read_text())
  weights = tmp_path / 'out' / 'sae.safetensors'
  whole = weights.read_bytes()
  weights.write_bytes(whole[:-9])
  with pytest.raises(ValueError, match='out is not an exported SAE .*; export'):
    gsae_jax.load(str(tmp_path / 'out'))
  weights.write_bytes(whole)
  for change in (
    {'config': {}},
    {'config': about['config'] | {'width': 3}},
    {'config': about['config'] | {'architecture': 'gated'}},
    {'metadata': []},
  ):
    (tmp_path / 'out' / 'sae.json').write_text(json.dumps(about | change))
    with pytest.raises(ValueError, match='is not an exported SAE .*; export'):
      gsae_jax.load(str(tmp_path / 'out'))
  (tmp_path / 'out' / 'sae.json').write_text(json.dumps(about | {'schema': 7}))
  with pytest.raises(
    ValueError, match='has schema 7, and this version reads 4'
  ):
    gsae_jax.load(str(tmp_path / 'out'))


@pytest.mark.integration
def test_a_repository_of_the_hub_is_a_folder(run, tmp_path, monkeypatch):
  workdir, x, _ = run
  asked = []

  def download(repository, revision):  # Files are links, as in the hub's cache.
    asked.append((repository, revision))
    for path in workdir.rglob('*'):
      link = tmp_path / 'snapshot' / path.relative_to(workdir)
      if path.is_dir():
        link.mkdir(parents=True, exist_ok=True)
      else:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return str(tmp_path / 'snapshot')

  monkeypatch.setattr('huggingface_hub.snapshot_download', download)
  sae = gsae_jax.load('hf://org/run@v1', member='g')
  want = gsae_jax.load(str(workdir), member='g')
  np.testing.assert_array_equal(sae(x), want(x))
  assert asked == [('org/run', 'v1')]

  def fail(repository, revision):
    assert revision is None
    raise ConnectionError('no network\nat all')

  monkeypatch.setattr('huggingface_hub.snapshot_download', fail)
  with pytest.raises(
    UserError, match='hf://org/no could not .*Error.; give'
  ) as e:
    gsae_jax.load('hf://org/no')
  assert '\n' not in str(e.value)


@pytest.mark.integration
def test_an_edit_changes_features_and_keeps_the_rest(run):
  workdir, x, _ = run
  sae = gsae_jax.load(str(workdir), member='g')
  f = np.asarray(sae.encode(x))
  feature = f.max(0).argmax()
  fires = f[:, feature] > 0
  assert 0 < fires.sum() < len(x)
  without = np.asarray(sae.edit(lambda f: f.at[:, feature].set(0))(x))
  np.testing.assert_array_equal(without[~fires], x[~fires])
  direction = np.asarray(sae.params['W_dec'])[feature]
  np.testing.assert_allclose(
    without, x - f[:, [feature]] * direction, rtol=1e-5, atol=1e-5
  )
  # The reconstruction loses as much as the activations do.
  less = sae.decode(np.where(np.arange(64) == feature, 0, f))
  np.testing.assert_allclose(x - without, sae(x) - less, atol=1e-4)
  more = sae.edit(lambda f: f.at[..., feature].add(3))
  np.testing.assert_allclose(more(x), x + 3 * direction, rtol=1e-5, atol=1e-5)
  assert more(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
  np.testing.assert_array_equal(sae.edit(lambda f: f)(x), x)


@pytest.mark.integration
@pytest.mark.parametrize('name', ['g', 'r'])
def test_jumprelu_form_is_the_same_sae(name, run, tmp_path):
  workdir, x, _ = run
  sae = gsae_jax.load(str(workdir), member=name)
  x = x + np.float32(0.1)
  jumped = sae.to_jumprelu()
  assert jumped.config == sae.config | {'architecture': 'jumprelu'}
  assert jumped.metadata == sae.metadata
  f = np.asarray(sae.encode(x))
  assert 0.01 < (f > 0).mean() < 0.5
  np.testing.assert_array_equal(jumped.encode(x) > 0, f > 0)
  np.testing.assert_allclose(jumped.encode(x), f, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(jumped(x), sae(x), rtol=1e-4, atol=1e-5)
  gap = sae.jumprelu_gap(x)
  largest = np.abs(jumped.encode(x) - f).max()
  assert gap == {'gates': 0, 'entries': f.size, 'largest': largest}
  # It is an SAE like any other.
  jumped.save(str(tmp_path / 'out'))
  again = gsae_jax.load(str(tmp_path / 'out'))
  assert repr(again).startswith(f"SAE({name!r}, architecture='jumprelu'")
  np.testing.assert_array_equal(again.encode(x), jumped.encode(x))
  assert again.jumprelu_gap(x)['largest'] == 0


@pytest.mark.integration
def test_jumprelu_gap_tells(run):
  workdir, x, _ = run
  sae = gsae_jax.load(str(workdir), member='g')
  f = np.asarray(sae.encode(x))
  # Another SAE: its first feature never fires, its second is larger.
  other = sae.to_jumprelu()
  other.params['threshold'] = other.params['threshold'].at[0].set(np.inf)
  other.params['W_enc'] = other.params['W_enc'].at[:, 1].multiply(1.5)
  sae.to_jumprelu = lambda: other
  gap = sae.jumprelu_gap(x)
  g = np.asarray(other.encode(x))
  same = (f > 0) == (g > 0)
  assert gap['gates'] == (~same).sum() >= (f[:, 0] > 0).sum() > 0
  assert gap['largest'] == np.abs(f - g)[same].max() > 0.1
  assert np.abs(f - g).max() > gap['largest']


def test_an_untied_encoder_has_no_jumprelu_form():
  config = {
    'name': 'u', 'architecture': 'gated', 'encoder': 'untied', 'width': 4,
    'features': 8,
  }  # fmt: skip
  module = make_module(VARIANTS | config)
  params = module.init(jax.random.key(0), np.zeros((1, 4)))['params']
  sae = restore.SAE(params, VARIANTS | config, {'step': 0})
  for attempt in (sae.to_jumprelu, lambda: sae.jumprelu_gap(np.zeros((1, 4)))):
    with pytest.raises(
      UserError, match="SAE 'u': encoder 'untied' has no"
    ) as e:
      attempt()
    assert '\n' not in str(e.value)


@pytest.mark.integration
def test_choices_that_are_not_clear(run, tmp_path):
  workdir, _, _ = run
  with pytest.raises(
    ValueError, match='member=None: the run .* has g, r; choose'
  ):
    gsae_jax.load(str(workdir))
  with pytest.raises(ValueError, match="member='x': .* has g, r"):
    gsae_jax.load(str(workdir), member='x')
  with pytest.raises(
    ValueError, match='no checkpoint of step 7 .* it has 0, 10,'
  ):
    gsae_jax.load(str(workdir), step=7, member='g')
  with pytest.raises(ValueError, match='no checkpoints at'):
    gsae_jax.load(str(tmp_path))
