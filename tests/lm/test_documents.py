"""The same documents, whatever they are kept in."""

import gzip
import json
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from gsae_jax.errors import UserError
from gsae_jax.lm import formats, text
from gsae_jax.lm.documents import locate, read_documents
from tests.support.commands import refuse

DOCUMENTS = [
  f'def f{i}(é):\n  return {i} * "日本"\n' * (1 + i % 9) for i in range(120)
]
ROWS = [{'id': i, 'body': d} for i, d in enumerate(DOCUMENTS)]
FORMATS = (
  'txt', 'txt.gz', 'jsonl', 'jsonl.gz', 'parquet', 'arrow', 'saved', 'hub'
)  # fmt: skip


@pytest.fixture(scope='module', autouse=True)
def quiet():
  datasets.disable_progress_bars()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """The documents in every format, each in two files, in folders of its own."""
  root = tmp_path_factory.mktemp('formats')
  for name in FORMATS:
    (root / name).mkdir()
  for i, part in enumerate((slice(0, 70), slice(70, None))):
    rows, table = ROWS[part], pa.Table.from_pylist(ROWS[part])
    lines = '\n'.join(map(json.dumps, rows)) + '\n\n'
    plain = '<|sep|>'.join(DOCUMENTS[part])
    (root / f'txt/{i}.txt').write_text(plain)
    (root / f'txt.gz/{i}.txt.gz').write_bytes(gzip.compress(plain.encode()))
    (root / f'jsonl/{i}.jsonl').write_text(lines)
    (root / f'jsonl.gz/{i}.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
    pa.parquet.write_table(
      table, root / f'parquet/{i}.parquet', row_group_size=30
    )
    with pa.ipc.new_stream(root / f'arrow/{i}.arrow', table.schema) as f:
      f.write_table(table)
  datasets.Dataset.from_list(ROWS).save_to_disk(root / 'saved', num_shards=12)
  # What `load_dataset` makes of a hub id, it makes of a folder.
  for i, part in enumerate((slice(0, 70), slice(70, None))):
    pa.parquet.write_table(
      pa.Table.from_pylist(ROWS[part]), root / f'hub/train-{i}.parquet'
    )
  return root


def place(folder, name):
  """Arguments of `locate` for a format."""
  where = {'path': str(folder / name), 'separator': None, 'field': 'body'}
  if name.startswith('txt'):
    where |= {'separator': '<|sep|>', 'field': 'text'}
  return where


def read(folder, name):
  if name == 'hub':
    path = str(folder / 'hub')
    return list(formats.hub(path, 'body', None, 'train', None))
  return list(locate(**place(folder, name))())


@pytest.mark.parametrize('name', FORMATS)
def test_a_format_has_every_document_in_its_order(name, folder):
  got = [d.strip() for d in read(folder, name)]
  assert got == [d.strip() for d in DOCUMENTS]


@pytest.mark.parametrize('order', ['hash', 'source'])
@pytest.mark.parametrize('name', FORMATS)
def test_a_format_has_the_contexts_and_the_halves_of_all(
  name, order, folder, embedded, monkeypatch
):
  if name == 'hub':  # There is none to be reached.
    hub = str(folder / 'hub')
    real = datasets.load_dataset
    monkeypatch.setattr(
      datasets, 'load_dataset', lambda path, **more: real(hub, **more)
    )
  settings = {
    'subset': None,
    'split': 'train',
    'revision': None,
    'order': order,
    'window': 20,
    'context_length': 16,
    'packing': 'stream',
    'prepend_bos': True,
    'special_tokens': 'drop',
    'held_out': 0.2,
  }
  parts = []
  for where in (place(folder, 'txt'), place(folder, name)):
    if name == 'hub' and where['path'].endswith('hub'):
      where['path'] = 'nobody/nothing'
    found = {}
    for part in ('train', 'held_out'):
      prepared = text.prepare(
        settings | where, embedded.tokenizer, part=part, rows=1000
      )
      windows = list(prepared.windows)
      found[part] = [
        np.concatenate([getattr(w, array) for w in windows])
        for array in ('ids_CL', 'documents_CL')
      ]
    parts.append(found)
  want, got = parts
  for part in want:
    for a, b in zip(want[part], got[part], strict=True):
      np.testing.assert_array_equal(a, b)
  assert not np.intersect1d(got['train'][1], got['held_out'][1]).size


def test_order_of_hash_drops_repetitions_and_order_of_source_does_not(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('one|two|one| |three')
  assert list(locate(str(path), '|')()) == ['one', 'two', 'one', 'three']
  found = read_documents(str(path), '|').texts
  assert sorted(found) == ['one', 'three', 'two'] and found != tuple(
    sorted(found)
  )


@pytest.mark.parametrize('size', [1, 2, 3, 5, 1000])
@pytest.mark.parametrize('separator', ['--', '-=-', '\n', None])
def test_a_separator_may_lie_across_the_pieces_that_are_read(
  size, separator, tmp_path, monkeypatch
):
  monkeypatch.setattr(formats, '_PIECE', size)
  content = 'ab--c-=-d---e\r\n-=--=-f----g-\n\nh-='
  (tmp_path / 'a').write_text(content, newline='')
  content = content.replace('\r\n', '\n')
  want = content.split(separator) if separator else [content]
  assert list(formats.plain(str(tmp_path / 'a'), separator)) == want


def test_order_of_source_reads_no_more_than_it_needs(
  embedded, tmp_path, monkeypatch
):
  (tmp_path / 'a.jsonl').write_text(
    '\n'.join(json.dumps({'text': d}) for d in DOCUMENTS * 50) + '\nnonsense'
  )
  settings = {
    'path': str(tmp_path / 'a.jsonl'),
    'separator': None,
    'field': 'text',
    'subset': None,
    'split': 'train',
    'revision': None,
    'window': None,
    'context_length': 16,
    'packing': 'stream',
    'prepend_bos': True,
    'special_tokens': 'drop',
    'held_out': 0.2,
  }
  prepare = lambda **more: text.prepare(
    settings | more, embedded.tokenizer, part='held_out', rows=1000
  )
  assert prepare(order='source').documents is None
  with pytest.raises(UserError, match='a.jsonl, line 6001 is not JSON'):
    prepare(order='hash')


@pytest.mark.parametrize(
  'name, content, match',
  [
    ('a.jsonl', b'{"text": "x"}\n{"text": ', 'a.jsonl, line 2 is not JSON'),
    ('a.jsonl', b'["x"]', 'a.jsonl, line 1 is not a JSON object'),
    ('a.jsonl', b'\n{"body": "x"}', "line 2 has no 'text'; it has 'body'"),
    ('a.jsonl', b'{"text": 3}', "line 1: 'text' is int, not a string"),
    ('a.jsonl', b'\n \n', 'no text in'),
    ('a.jsonl.gz', b'{"text": "x"}', 'cannot read .*a.jsonl.gz: Not a gzip'),
    ('a.txt.gz', gzip.compress(b'abc' * 99, mtime=0)[:-9], 'cannot read .*a.txt.gz'),
    ('a.parquet', b'PAR1 and so on', 'cannot read .*a.parquet: .*download it'),
    ('a.arrow', b'ARROW1 and so on', 'cannot read .*a.arrow: .*download it'),
    ('a.txt', 'x'.encode('utf-16'), 'a.txt is not plain text in UTF-8'),
    ('state.json', b'{}', 'state.json does not list the shards'),
    ('state.json', b'{"_data_files": [{"filename": "b.arrow"}]}',
     'cannot read .*b.arrow'),
    ('dataset_dict.json', b'{}', 'several datasets; .* such as .*train'),
    ('a.doc', b'x', 'has no file that ends in .txt, .txt.gz, .jsonl'),
  ],
)  # fmt: skip
def test_a_file_that_is_wrong_has_a_line(name, content, match, tmp_path):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=match) as e:
    list(locate(str(tmp_path), None)())
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', ['parquet', 'arrow'])
def test_a_table_that_is_wrong_has_a_line(name, folder, tmp_path):
  with pytest.raises(
    UserError, match=f"0.{name} has no 'text'; it has 'id', 'b"
  ):
    list(locate(str(folder / name), None)())
  with pytest.raises(
    UserError, match=f"0.{name}, row 0: 'id' is int, not a st"
  ):
    list(locate(str(folder / name), None, field='id')())
  table = pa.table({'text': ['a', 'b', None, 'c']})
  path = tmp_path / f'a.{name}'
  if name == 'parquet':
    pa.parquet.write_table(table, path)
  else:
    with pa.ipc.new_stream(path, table.schema) as f:
      f.write_table(table)
  documents = locate(str(path), None)()
  assert [next(documents), next(documents)] == ['a', 'b']
  with pytest.raises(
    UserError, match="row 2: 'text' is NoneType, not a string"
  ):
    next(documents)


def test_a_dataset_that_is_wrong_has_a_line(folder):
  path = str(folder / 'hub')
  for arguments, match in (
    (('text', None, 'train', None), "has no 'text'; it has 'id', 'body'"),
    (('id', None, 'train', None), "row 0: 'id' is int, not a string"),
    (('body', 'part', 'train', None), r"ValueError: .*'part'.*check text.subset"),
    (('body', None, 'test', None), r"ValueError: .*test.*text.split"),
  ):  # fmt: skip
    with pytest.raises(UserError, match=match) as e:
      list(formats.hub(path, *arguments))
    assert '\n' not in str(e.value)


@pytest.mark.integration
def test_without_a_network_there_is_no_hub():
  refuse(
    'harvest',
    '--store=/nonexistent/store',
    '--config.text.path=nobody/nothing',
    match="text.path: 'nobody/nothing' is neither here nor could it be read",
    HF_HUB_OFFLINE='1',
  )


@pytest.mark.parametrize('name', ['a/b', 'wikitext'])
def test_without_datasets_its_extra_is_named(name, monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(UserError, match=r"datasets.*'gsae_jax\[datasets\]'"):
    locate(name, None)


@pytest.mark.parametrize('kind', ['parquet', 'arrow', 'saved'])
def test_without_pyarrow_its_extra_is_named(kind, folder, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(UserError, match=r"pyarrow.*'gsae_jax\[datasets\]'"):
    locate(str(folder / kind), None, field='body')


@pytest.mark.parametrize(
  'path', ['a/b.txt', 'a/b.jsonl', 'a.b', './a', '/a/b', 'a/b/c', '~/a', 'a*',
           'tests/nothing', 'a.parquet', 'org/name.json'],
)  # fmt: skip
def test_a_mistyped_path_is_no_hub_id(path):
  with pytest.raises(UserError, match='text.path: no file matches'):
    locate(path, None)


@pytest.mark.parametrize(
  'name, option, match',
  [
    (
      'txt',
      {'subset': 'en'},
      "text.subset: 'en' is for hub ids, and .* on this",
    ),
    ('jsonl', {'split': 'test'}, "text.split: 'test' is for hub ids"),
    ('saved', {'revision': 'main'}, "text.revision: 'main' is for hub ids"),
    ('txt', {'field': 'body'}, "text.field: 'body' is for JSONL, Parquet"),
    ('jsonl', {'separator': '\n'}, r"text.separator: '\\n' is for plain text"),
    ('parquet', {'separator': '|'}, r"text.separator: '|' is for plain text"),
  ],
)
def test_an_option_is_not_left_out_silently(name, option, match, folder):
  where = {'path': str(folder / name), 'separator': None} | option
  with pytest.raises(UserError, match=match):
    locate(**where)
  with pytest.raises(UserError, match="text.separator: '|' is for plain text"):
    locate('nobody/nothing', '|')


def test_a_name_may_have_brackets(tmp_path):
  (tmp_path / 'a[1].txt').write_text('x')
  assert list(locate(str(tmp_path / 'a[1].txt'), None)()) == ['x']
