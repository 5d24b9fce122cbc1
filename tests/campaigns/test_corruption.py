"""Files are damaged at drawn places; no reader gives values that are wrong.

Stores are held to that whatever the damage is: their files carry checksums,
fingerprints and digests. Checkpoints, exports, evaluation records and metrics
have no digests yet. Of them only damage that shows by itself is tried: files
that are cut off or gone.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import tempfile

import jax
import numpy as np
import pytest
from etils import epath

import gsae_jax
from gsae_jax.activations import layout
from gsae_jax.activations.loader import Loader
from gsae_jax.activations.store import open_store
from gsae_jax.activations.verify import Verifier
from gsae_jax.errors import UserError
from gsae_jax.evaluation import features, records
from gsae_jax.training.records import read_metrics
from tests.campaigns import damages
from tests.campaigns.damages import pick
from tests.support.activations import CHUNK, ROWS, SHARD, SITES, WIDTH, fill
from tests.support.commands import files

# When one array of a checkpoint cannot be read, Orbax leaves the reads of the
# others to end after their event loop.
pytestmark = pytest.mark.filterwarnings(
  'ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning'
)


@contextlib.contextmanager
def copy_of(folder):
  """A copy to be damaged, gone afterwards: a campaign makes thousands."""
  with tempfile.TemporaryDirectory(prefix='gsae-damaged-') as place:
    copy = pathlib.Path(place) / folder.name
    shutil.copytree(folder, copy)
    yield copy


@contextlib.contextmanager
def refusals():
  """Lets readers refuse, in one line; yields the messages."""
  said = []
  try:
    yield said
  except UserError as e:
    said.append(str(e))
    assert str(e) and '\n' not in str(e), e


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
  """Finished stores, by whether their sites are stored with a mean removed."""
  folder = tmp_path_factory.mktemp('stores')
  for centred in (False, True):
    fill(folder / str(centred), centred=centred)
  return {centred: folder / str(centred) for centred in (False, True)}


def contents(path):
  """Everything that can be read of a store: its description and all rows."""
  store = open_store(str(path))
  about = dataclasses.asdict(store) | {'path': None}
  arrays = [*layout.ROW_ARRAYS, *(f'{site}/activations' for site in SITES)]
  return about, {name: store.array(name)[:].read().result() for name in arrays}


def assert_same(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def chunk_bytes(name):
  """Bytes of an inner chunk, with its checksum, in a file of an array."""
  array = name.partition('/c/')[0]
  if array in layout.ROW_ARRAYS:
    return CHUNK * np.dtype(layout.ROW_ARRAYS[array]).itemsize + 4
  return CHUNK * WIDTH * 2 + 4


def damage_store(rng, path):
  """Damages a drawn file, or a pair; returns the names of changed files."""
  before = files(path)
  names = sorted(before)
  name = pick(rng, names)
  kinds = [*damages.OF_ONE_FILE, 'files', 'copy', 'blocks']
  kind = pick(rng, kinds)
  if kind == 'blocks':
    name = pick(rng, [n for n in names if '/c/' in n])
    block = pick(rng, [chunk_bytes(name), int(rng.integers(1, 200))])
    damages.swap_blocks(rng, path / name, block)
  elif kind in ('files', 'copy'):
    # Half of the time of the same array: those have the same form.
    alike = [n for n in names if n.partition('/')[0] == name.partition('/')[0]]
    other = pick(rng, pick(rng, [names, alike]))
    if kind == 'files':
      damages.swap_files(path / name, path / other)
    else:
      (path / name).write_bytes((path / other).read_bytes())
  else:
    kind(rng, path / name)
  after = files(path)
  return {n for n in names if before[n] != after.get(n)}


def verify(path):
  return [d for found in Verifier(str(path)).damage() for d in found]


def check_readers(rng, path, rows):
  """What readers give of a damaged store is right, or they refuse."""
  with refusals():
    store = open_store(str(path))
    for site in SITES:
      first = int(rng.integers(ROWS))
      last = int(rng.integers(first, ROWS)) + 1
      with refusals():
        assert_same(store.read(site, first, last), rows[site][first:last])
    unit = pick(rng, ['chunk', 'shard'])
    loader = Loader(
      store, SITES, batch_size=64, seed=int(rng.integers(99)), unit=unit,
      shuffle_rows=SHARD, in_memory=bool(rng.integers(2)),
    )  # fmt: skip
    for step in rng.integers(30, size=4).tolist():
      for site in SITES:
        with refusals():
          found = loader.rows_at(step, site)
          assert_same(found, rows[site][loader.row_numbers(step)])


@pytest.mark.campaign(1500)
def test_a_damaged_store_is_found_or_reads_as_before(trial, stores):
  rng = trial.rng()
  centred = bool(rng.integers(2))
  whole = stores[centred]
  about, arrays = contents(whole)
  opened = open_store(str(whole))
  rows = {site: opened.read(site, 0, ROWS) for site in SITES}
  with copy_of(whole) as path:
    changed = damage_store(rng, path)
    bad = []
    with refusals() as refused:
      bad = verify(path)
    assert {d.key for d in bad} <= changed
    if refused:
      assert 'manifest.json' in changed
    if not bad and not refused:
      assert_same(contents(path), (about, arrays))
    check_readers(rng, path, rows)
    # Harvest makes it whole again: at once where it notices the damage, which
    # it need not, and else after it is repaired.
    if refused:
      (path / 'manifest.json').unlink(missing_ok=True)
    if refused or rng.integers(2):
      fill(path, centred=centred)
      bad = verify(path)
    if bad:
      Verifier(str(path)).repair(bad)
      fill(path, centred=centred)
    assert verify(path) == []
    assert_same(contents(path), (about, arrays))


def cut_or_delete(rng, folder, names):
  """Damages a drawn file so that it shows; returns its name."""
  name = pick(rng, [n for n in names if (folder / n).stat().st_size])
  pick(rng, [damages.truncate, damages.delete])(rng, folder / name)
  return name


@pytest.fixture(scope='module')
def trained(smoke):
  """A workdir with evaluations, and what is right of each of its members."""
  _, workdir, *_ = smoke
  members = 'gated_mlp_out.0', 'relu_mlp_hidden.0'
  saes = {
    (step, m): gsae_jax.load(str(workdir), step=step, member=m)
    for step in (20, 40)
    for m in members
  }
  return workdir, saes


@pytest.mark.campaign(300)
def test_a_checkpoint_with_a_lost_file_is_refused_or_right(trial, trained):
  rng = trial.rng()
  workdir, saes = trained
  with copy_of(workdir / 'checkpoints') as folder:
    last = folder / '40'
    cut_or_delete(rng, last, sorted(files(last)))
    for (step, member), want in saes.items():
      with refusals() as refused:
        sae = gsae_jax.load(str(folder), step=step, member=member)
        assert sae.metadata['step'] == step and sae.config == want.config
        assert_same(sae.params, want.params)
      # The one before is not touched.
      assert step == 40 or not refused


@pytest.mark.campaign(300)
def test_an_export_with_a_lost_file_is_refused_or_right(trial, trained):
  rng = trial.rng()
  _, saes = trained
  want = pick(rng, list(saes.values()))
  with tempfile.TemporaryDirectory(prefix='gsae-damaged-') as folder:
    want.save(folder)
    cut_or_delete(rng, pathlib.Path(folder), ['sae.json', 'sae.safetensors'])
    with refusals():
      sae = gsae_jax.load(folder)
      assert sae.config == want.config
      assert_same(sae.params, want.params)


@pytest.mark.campaign(300)
def test_evaluations_with_a_lost_file_are_refused_or_right(trial, trained):
  rng = trial.rng()
  workdir, _ = trained
  member = 'gated_mlp_out.0'

  def readers(folder):
    """What reads evaluations, each giving a dictionary."""

    def documents():
      if 40 not in records.read_evaluations(folder):
        return {}
      found = records.read_documents(folder, 40)
      return vars(found) if found else {}

    yield lambda: records.read_evaluations(folder)
    yield documents
    yield lambda: dict(enumerate(features.read(folder, 40, member)))

  wanted = [read() for read in readers(epath.Path(workdir))]
  with copy_of(workdir / 'eval') as folder:
    cut_or_delete(rng, folder, sorted(files(folder)))
    for read, want in zip(
      readers(epath.Path(folder.parent)), wanted, strict=True
    ):
      with refusals():
        found = read()
        # A file that is gone leaves out its step, or the sums of documents.
        assert_same(found, {k: want[k] for k in found})


@pytest.mark.campaign(100)
def test_metrics_that_are_cut_off_are_the_first_lines(trial, trained):
  rng = trial.rng()
  workdir, _ = trained
  raw = (workdir / 'metrics.jsonl').read_bytes()
  want = read_metrics(epath.Path(workdir / 'metrics.jsonl'))
  with tempfile.TemporaryDirectory(prefix='gsae-damaged-') as folder:
    path = epath.Path(folder) / 'metrics.jsonl'
    at = int(rng.integers(len(raw)))
    path.write_bytes(raw[:at])
    found = read_metrics(path)
    assert found == want[: len(found)]
    assert len(found) >= raw[:at].count(b'\n')
