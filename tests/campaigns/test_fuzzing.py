"""Nonsense is refused in one line, wherever it enters; no trial ends otherwise.

A config of wrong fields and values, by file and on a command line, and files that
another program wrote or somebody edited: metrics, evaluations, manifests,
exports, features and models' tensors.
"""

import contextlib
import dataclasses
import json
import sys

import ml_collections
import numpy as np
import pytest
import safetensors.numpy
from absl import flags
from etils import epath

import gsae_jax
from experiments import quickstart, smoke
from gsae_jax import config as config_lib
from gsae_jax import program
from gsae_jax.activations import shards
from gsae_jax.activations.store import open_store
from gsae_jax.activations.verify import Verifier
from gsae_jax.errors import UserError
from gsae_jax.evaluation import features, metrics, page, pareto, records
from gsae_jax.lm import tensors
from gsae_jax.parsing import plain
from gsae_jax.restore import SAE
from gsae_jax.sae import VARIANTS
from gsae_jax.training.records import read_metrics
from tests.campaigns import garbage
from tests.campaigns.damages import pick
from tests.support.activations import fill

# Draws in a trial, which take milliseconds each.
DRAWS = 100


@contextlib.contextmanager
def refusal():
  """Lets a reader refuse, in one line."""
  try:
    yield
  except UserError as e:
    # As it is printed: what cannot be encoded is escaped.
    assert str(e) and len(str(e).splitlines()) == 1, repr(str(e))


def listed(tree):
  """The same tree with lists for tuples, to be changed in place."""
  if isinstance(tree, dict):
    return {k: listed(v) for k, v in tree.items()}
  return [*map(listed, tree)] if isinstance(tree, tuple | list) else tree


def check_config(raw):
  """A config parses, and to the same again; or it is refused."""
  with refusal():
    config = config_lib.parse(raw)
    json.dumps(config.identity())
    again = plain(dataclasses.asdict(config))
    assert config_lib.parse(ml_collections.ConfigDict(again)) == config


@pytest.mark.campaign(400)
def test_a_config_of_drawn_values_parses_or_is_refused(trial):
  rng = trial.rng()
  base = pick(rng, [quickstart, smoke]).get_config().to_dict()
  for _ in range(DRAWS):
    tree = listed(base)
    for _ in range(int(rng.integers(1, 4))):
      garbage.change(rng, tree, garbage.VALUES + garbage.OBJECTS)
    raw = ml_collections.ConfigDict(tree)
    check_config(raw)


WORDS = (
  '', '0', '1', '-1', '1e3', '1.5', 'nan', 'inf', '9' * 400, 'None', 'none', 'True',
  'false', 'abc', 'é', 'a\nb', '()', '(1,)', '(1, 2)', '[1]', '(((', '{}', '{"a": 1}',
  "'a'", '"', 'float32', 'gated', 'mlp_out.0', "('mlp_out.0',)", 'lambda: 0', '0x10',
  '1_000', '1j', 'b"x"',
)  # fmt: skip


def drawn_flag(rng, tree):
  """A flag for a drawn field of the config, or for one that it has not."""
  *path, name = pick(rng, [*garbage.places(tree)])
  parent = tree
  for key in path:
    parent = parent[key]
  alike = [
    v
    for v in garbage.VALUES
    if type(v) is type(parent[name]) and v != '\ud800'  # Not in a terminal.
  ]
  words = pick(rng, [WORDS, [*map(str, alike)] or WORDS])
  field = '.'.join([*path, name])
  if rng.random() < 0.3:
    others = [
      f'{field}.x', f'{field}[0]', f'{field}[0].l1', f"{field}['l1']", field[:-1],
      f'{field}.', f'.{field}', 'nope', '', 'a b', field.replace('.', '..'),
      field.upper(), f'saes[{int(rng.integers(-2, 12))}]',
    ]  # fmt: skip
    field = pick(rng, others)
  start = pick(rng, ['--config.', '--config.', '-config.', '--noconfig.'])
  return f'{start}{field}' + (
    '' if rng.random() < 0.1 else f'={pick(rng, words)}'
  )


# A command takes its flags from sys.argv as well; absl warns of its own ways.
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.campaign(200)
def test_a_command_line_of_drawn_overrides_parses_or_is_refused(
  trial, capsys, monkeypatch
):
  rng = trial.rng()
  tree = quickstart.get_config().to_dict()
  for draw in range(DRAWS):
    given = flags.FlagValues()
    program.define_config(given)
    argv = ['train', '--config=experiments/quickstart.py']
    argv += [drawn_flag(rng, tree) for _ in range(min(draw, 3))]
    monkeypatch.setattr(sys, 'argv', argv)
    try:
      program._parse_flags(given, argv)
    except SystemExit as e:
      said = capsys.readouterr().err
      assert draw and e.code == 1 and said.startswith('error: '), (argv, said)
      assert len(said.splitlines()) == 1, (argv, said)
      continue
    with refusal():
      check_config(program.read_config(given))


def change(rng, raw):
  """Bytes of a JSON file, or of JSON lines, changed in their form or content."""
  if rng.integers(2):
    return garbage.change_bytes(rng, raw)
  lines = raw.decode().splitlines()
  if len(lines) > 1 and lines[0].startswith('{"step"'):
    at = int(rng.integers(len(lines)))
    lines[at] = garbage.change_json(rng, lines[at])
    return '\n'.join(lines).encode()
  return garbage.change_json(rng, raw.decode()).encode()


MEMBERS = 'gated_a', 'relu_b'
SITE = 'mlp_out.0'


def evaluation(rng, step, member):
  """A record of an evaluation, and the sums that it is made of."""
  kinds = (*metrics.OF_SITE, *metrics.OF_SAE)
  sums = {name: rng.uniform(1, 2, size=6) for name in kinds}
  sums['ce_zero'] += 3
  architecture = member.partition('_')[0]
  record = {
    'member': member, 'site': SITE, 'architecture': architecture, 'variant': '',
    'features': 8, 'l1_coefficient': 0.1, 'seed': 0, 'step': step,
    'tokens_trained': step * 128, **metrics.record(sums, np.arange(8)),
    'evaluation': {'stride': 1, 'text': 'stdlib', 'dashboards': True},
  }  # fmt: skip
  return record, sums


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run's files beside its checkpoints, all sound."""
  rng = np.random.default_rng(0)
  folder = tmp_path_factory.mktemp('run')
  (folder / 'eval').mkdir()
  for step in (10, 20):
    found = {m: evaluation(rng, step, m) for m in MEMBERS}
    path = folder / 'eval' / f'step_{step}.json'
    path.write_text(json.dumps([record for record, _ in found.values()]))
    documents = records.Documents(
      np.arange(6, dtype=np.uint64), {m: sums for m, (_, sums) in found.items()}
    )
    packed = records.pack(documents, dict.fromkeys(MEMBERS, SITE))
    path.with_suffix('.documents.safetensors').write_bytes(packed)
  lines = [
    {'step': s, 'tokens': s * 128, 'member': m, 'loss': 1 / s, 'l0': 5.0,
     'alive_fraction': 1.0}
    for s in range(1, 21)
    for m in (*MEMBERS, None)
  ]  # fmt: skip
  (folder / 'metrics.jsonl').write_text(
    '\n'.join(map(json.dumps, lines)) + '\n'
  )
  return folder


def report(folder):
  """What gsae_jax.report and the end of gsae_jax.evaluate do."""
  found = records.read_evaluations(folder)
  resampled = records.read_replicates(folder, found)
  pareto.summary(found, resampled)
  page.render('run', found, read_metrics(folder / 'metrics.jsonl'), resampled)


def check_changed(rng, path, read, make=change):
  """Reads a sound file, and then changed ones in its place."""
  sound = path.read_bytes()
  read()
  try:
    for _ in range(DRAWS):
      path.write_bytes(make(rng, sound))
      with refusal():
        read()
  finally:
    path.write_bytes(sound)


@pytest.mark.campaign(40)
def test_changed_metrics_are_read_or_refused(trial, workdir):
  path = workdir / 'metrics.jsonl'

  def read():
    for record in read_metrics(epath.Path(path)):
      assert isinstance(record['step'], int), record
      assert isinstance(record['member'], str | None), record

  check_changed(trial.rng(), path, read)


@pytest.mark.campaign(40)
def test_a_report_of_changed_files_is_drawn_or_refused(trial, workdir):
  rng = trial.rng()
  name = pick(rng, ['eval/step_20.json', 'eval/step_10.json', 'metrics.jsonl'])
  check_changed(rng, workdir / name, lambda: report(epath.Path(workdir)))


# Sums may be NaN, and then NumPy says so.
@pytest.mark.filterwarnings('ignore::RuntimeWarning')
@pytest.mark.campaign(40)
def test_changed_sums_of_documents_are_read_or_refused(trial, workdir):
  rng = trial.rng()
  path = workdir / 'eval/step_20.documents.safetensors'
  check_changed(rng, path, lambda: report(epath.Path(workdir)), change_tensors)


def change_tensors(rng, raw):
  """A safetensors file with a changed header, whose length fits or does not."""
  if rng.integers(3) == 0:
    return garbage.change_bytes(rng, raw)
  size = int.from_bytes(raw[:8], 'little')
  header = garbage.change_json(rng, raw[8 : 8 + size].decode()).encode()
  length = len(header) if rng.integers(5) else int(rng.integers(2**40))
  return length.to_bytes(8, 'little') + header + raw[8 + size :]


@pytest.mark.campaign(40)
def test_changed_features_are_read_or_refused(trial, tmp_path):
  folder = epath.Path(tmp_path)
  for name in ('a', 'contexts'):
    path = features.folder(folder, 1) / f'{name}.safetensors'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(features.pack({'density': np.ones(4, np.float32)}))
  check_changed(
    trial.rng(), path, lambda: features.read(folder, 1, 'a'), change_tensors
  )


@pytest.mark.campaign(40)
def test_changed_tensors_of_a_model_are_read_or_refused(trial, tmp_path):
  arrays = {
    'wte': np.arange(12, dtype=np.float32).reshape(3, 4),
    'ln': np.ones(4, np.float16),
  }
  path = tmp_path / 'model.safetensors'
  safetensors.numpy.save_file(arrays, path)

  def read():
    found, _ = tensors.find(str(tmp_path))
    for name, tensor in found.items():
      tensor.check_dtype(name)
      assert tensor.open().shape == tensor.shape

  check_changed(trial.rng(), path, read, change_tensors)


@pytest.mark.campaign(40)
def test_changed_exports_are_read_or_refused(trial, tmp_path):
  rng = trial.rng()
  params = {
    'W_gate': (4, 8), 'b_gate': 8, 'r_mag': 8, 'b_mag': 8, 'W_dec': (8, 4),
    'b_dec': 4,
  }  # fmt: skip
  about = {
    'name': 'a', 'architecture': 'gated', 'site': SITE, 'width': 4, 'features': 8,
    'l1': 0.1, 'seed': 0, **VARIANTS,
  }  # fmt: skip
  sae = SAE(
    {k: np.ones(shape, np.float32) for k, shape in params.items()},
    about,
    {'step': 3},
  )
  sae.save(str(tmp_path))

  def read():
    found = gsae_jax.load(str(tmp_path))
    repr(found)

  if rng.integers(2):
    check_changed(rng, tmp_path / 'sae.json', read)
  else:
    check_changed(rng, tmp_path / 'sae.safetensors', read, change_tensors)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  folder = tmp_path_factory.mktemp('store')
  fill(folder)
  return folder


@pytest.mark.campaign(40)
def test_a_changed_manifest_is_the_same_or_refused(trial, store):
  sound = open_store(str(store))

  def read():
    with refusal():
      Verifier(str(store))
    found = open_store(str(store))
    assert dataclasses.asdict(found).keys() == dataclasses.asdict(sound).keys()
    assert found.identity == sound.identity and found.rows == sound.rows

  check_changed(trial.rng(), store / 'manifest.json', read)


@pytest.mark.campaign(40)
def test_a_changed_record_is_the_same_or_damaged(trial, store):
  rng = trial.rng()
  raw = (store / 'records/1.json').read_bytes()
  of = open_store(str(store)).content_hash
  sound = shards.read_record(raw, of, 1)
  for _ in range(DRAWS):
    try:
      found = shards.read_record(change(rng, raw), of, 1)
    except shards.Damaged:
      continue
    assert found.to_json(of, 1) == sound.to_json(of, 1)
