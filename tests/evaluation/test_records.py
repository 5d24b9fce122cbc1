"""Evaluations that are read again: they are right, or refused in one line."""

import json

import numpy as np
import pytest

from gsae_jax.errors import UserError
from gsae_jax.evaluation import features, metrics, records

KINDS = (*metrics.OF_SITE, *metrics.OF_SAE)


@pytest.fixture
def evaluated(tmp_path):
  """A workdir with one evaluation, its record and its sums of documents."""
  sums = {name: np.arange(1.0, 5) for name in KINDS}
  record = {
    'member': 'a', 'site': 's', 'architecture': 'gated', 'variant': '',
    'features': 4, 'seed': 0, 'l1_coefficient': 0.1, 'tokens_trained': 128,
    **metrics.record(sums, np.arange(4)), 'evaluation': {},
  }  # fmt: skip
  path = records.records_path(tmp_path, 7)
  path.parent.mkdir()
  path.write_text(json.dumps([record]))
  packed = records.pack(
    records.Documents(np.arange(4), {'a': sums}), {'a': 's'}
  )
  records.documents_path(tmp_path, 7).write_bytes(packed)
  return tmp_path, record, sums


def test_records_and_sums_come_back(evaluated):
  workdir, record, sums = evaluated
  (workdir / 'eval' / 'step_latest.json').write_text('a copy')
  assert records.read_evaluations(workdir) == {7: [record]}
  found = records.read_documents(workdir, 7)
  np.testing.assert_array_equal(found.ids, np.arange(4))
  np.testing.assert_array_equal(found.sums['a']['l0'], sums['l0'])


@pytest.mark.parametrize(
  'change, why',
  [
    ({'l0': None}, 'l0 is None, which is no number'),
    ({'l0': float('nan')}, 'l0 is nan'),
    ({'gamma': '1'}, "gamma is '1'"),
    ({'gamma': True}, 'gamma is True'),
    ({'ce_clean': 10**400}, 'ce_clean is 10+,'),
    ({'site': 3}, 'site is 3, which is no text'),
  ],
)
def test_records_of_wrong_types_are_refused(evaluated, change, why):
  workdir, record, _ = evaluated
  path = records.records_path(workdir, 7)
  path.write_text(json.dumps([record | change]))
  with pytest.raises(UserError, match=f'step_7.json is not an eval.*{why}'):
    records.read_records(path)


def test_what_is_not_json_is_refused(evaluated):
  path = records.records_path(evaluated[0], 7)
  for raw in (b'[{', b'[]', b'[3]', b'\xff', b'[' * 100_000):
    path.write_bytes(raw)
    with pytest.raises(UserError, match='step_7.json is not an evaluation'):
      records.read_records(path)


def test_sums_of_another_kind_are_refused(evaluated):
  workdir, _, sums = evaluated
  for ids, changed in (
    (np.arange(3), sums),
    (np.arange(4), sums | {'l0': sums['l0'].astype(np.float32)}),
  ):
    packed = records.pack(records.Documents(ids, {'a': changed}), {'a': 's'})
    records.documents_path(workdir, 7).write_bytes(packed)
    with pytest.raises(UserError, match='does not go with the records beside'):
      records.read_documents(workdir, 7)


def test_a_damaged_file_of_features_is_named(tmp_path):
  folder = features.folder(tmp_path, 7)
  folder.mkdir(parents=True)
  for name in ('a', 'contexts'):
    whole = features.pack({'density': np.ones(4)})
    (folder / f'{name}.safetensors').write_bytes(whole)
  features.read(tmp_path, 7, 'a')
  (folder / 'a.safetensors').write_bytes(whole[:-3])
  with pytest.raises(UserError, match='a.safetensors is damaged .*step_7.json'):
    features.read(tmp_path, 7, 'a')
