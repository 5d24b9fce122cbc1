"""Documents, their split, and packing."""

import dataclasses
import hashlib
import tracemalloc

import numpy as np
import pytest

from gsae_jax.errors import UserError
from gsae_jax.lm import text
from gsae_jax.lm.contexts import Held
from gsae_jax.lm.documents import document_id
from tests.support import golden_text


@pytest.fixture(scope='module')
def tokenizer(embedded):
  return embedded.tokenizer


@pytest.fixture
def stories_file(tmp_path):
  path = tmp_path / 'a.txt'
  documents = [f'def f{i}(x):\n  return x + {i}\n' * 5 for i in range(200)]
  path.write_text('<|sep|>'.join([*documents, documents[0], '  ']))
  return path


def pack(texts, tokenizer, **changes):
  values = {
    'context_length': 16,
    'packing': 'stream',
    'prepend_bos': True,
    'special_tokens': 'drop',
    'rows': 500,
  }
  return text.pack(texts, tokenizer, **values | changes)


def test_documents_are_distinct_and_in_an_order_of_their_own(stories_file):
  documents = text.read_documents(str(stories_file), '<|sep|>')
  assert len(documents.texts) == 200
  whole = text.read_documents(str(stories_file), None)
  assert len(whole.texts) == 1 and whole.digest != documents.digest
  again = text.read_documents(str(stories_file.parent / '*.txt'), '<|sep|>')
  assert again == documents


def test_the_parts_share_nothing_and_do_not_depend_on_the_rest(stories_file):
  documents = text.read_documents(str(stories_file), '<|sep|>')
  train = set(text.split(documents, 0.25, 'train'))
  held = set(text.split(documents, 0.25, 'held_out'))
  assert not train & held and len(train | held) == 200
  assert 30 < len(held) < 70
  half = text.Documents(documents.texts[::2], '')
  assert set(text.split(half, 0.25, 'held_out')) == held & set(half.texts)


def test_a_part_without_documents_says_what_to_do(stories_file):
  one = text.read_documents(str(stories_file), None)
  with pytest.raises(UserError, match='leaves none for .*; set text.separator'):
    text.split(one, 0.001, 'held_out')


def test_stream_packing_keeps_every_token_in_order(tokenizer):
  texts = ['import os\n' * 30, 'x = 1\n' * 9, 'pass\n' * 80]
  contexts = pack(texts, tokenizer, rows=200)
  bos = tokenizer.bos_id
  assert (contexts.ids_CL[:, 0] == bos).all()
  np.testing.assert_array_equal(contexts.special_CL, contexts.ids_CL == bos)
  np.testing.assert_array_equal(contexts.mask_CL, contexts.ids_CL != bos)
  want = [i for ids in tokenizer.encode(texts) for i in ids]
  got = contexts.ids_CL[contexts.mask_CL].tolist()
  assert got == want[: len(got)] and len(got) >= 200
  # Each of the documents begins behind a BOS; none is doubled.
  following = contexts.ids_CL[:, 1:][contexts.ids_CL[:, :-1] == bos]
  assert bos not in following
  assert tokenizer.encode(['x'])[0][0] in following


def test_every_token_knows_its_document(tokenizer):
  texts = ['import os\n' * 30, 'x = 1\n' * 9, 'pass\n' * 80]
  for packing, rows in (('stream', 200), ('documents', 30)):
    contexts = pack(texts, tokenizer, packing=packing, rows=rows)
    ids, documents = contexts.ids_CL, contexts.documents_CL
    assert documents.shape == ids.shape and documents.dtype == np.uint64
    for i, source in enumerate(texts):
      mine = documents == document_id(source)
      want = tokenizer.encode([source])[0]
      got = ids[mine & contexts.mask_CL].tolist()
      assert got == want[: len(got)]
      if packing == 'stream' and i < 2:
        # All of it, and a BOS in front, and one wherever a context begins.
        assert len(got) == len(want)
        cuts = mine[1:, 1] & mine[:-1, -1]
        assert (mine & contexts.special_CL).sum() == 1 + cuts.sum()
  digest = hashlib.sha256(texts[0].encode()).hexdigest()
  assert document_id(texts[0]) == int(digest[:16], 16)


def test_document_packing_begins_every_context_with_a_document(tokenizer):
  texts = [f'class A{i}:\n' + '  y = 2\n' * 20 for i in range(30)]
  contexts = pack(texts, tokenizer, packing='documents', rows=300)
  first = [ids[:15] for ids in tokenizer.encode(texts)]
  assert [row[1:].tolist() for row in contexts.ids_CL] == first[:20]


def test_without_bos_there_is_none(tokenizer):
  texts = ['import os\n' * 300]
  contexts = pack(texts, tokenizer, prepend_bos=False)
  assert contexts.mask_CL.all() and not contexts.special_CL.any()
  want = tokenizer.encode(texts)[0]
  assert contexts.ids_CL.ravel().tolist() == want[: contexts.ids_CL.size]


# By the code that packed one document after the other, kept in memory.
GOLDEN = (
  '4407d99a46764c32', '368496286b59a8d5', '34e3a68670876725',
  '3533fb3fff008776', '442921f7a8e1d49e', '9dfe32068683d70c',
  'c7327d67aaf901fd', '5c35686575472985',
)  # fmt: skip


@pytest.mark.parametrize(
  'policy, digest', list(zip(golden_text.POLICIES, GOLDEN, strict=True))
)
def test_contexts_are_what_they_have_always_been(
  policy, digest, tokenizer, tmp_path
):
  packing, prepend_bos, special_tokens = policy
  path = tmp_path / 'golden.txt'
  path.write_text('<sep>'.join(golden_text.documents()), newline='')
  documents = text.read_documents(str(path), '<sep>')
  assert documents.digest.startswith('1d4b86ee551f96eb36e0783e4cc5e764')
  contexts = pack(
    text.split(documents, 0.1, 'train'),
    tokenizer,
    context_length=32,
    packing=packing,
    prepend_bos=prepend_bos,
    special_tokens=special_tokens,
    rows=5000,
  )
  arrays = 'ids_CL', 'mask_CL', 'special_CL', 'documents_CL'
  assert digest == golden_text.digest(*(getattr(contexts, a) for a in arrays))


@pytest.mark.parametrize('policy', golden_text.POLICIES)
@pytest.mark.parametrize('together', [1, 3, 50])
def test_what_is_tokenised_together_does_not_matter(
  policy, together, tokenizer, monkeypatch
):
  packing, prepend_bos, special_tokens = policy
  make = lambda: pack(
    golden_text.documents(60),
    tokenizer,
    context_length=100,  # Some documents are longer, most are shorter.
    packing=packing,
    prepend_bos=prepend_bos,
    special_tokens=special_tokens,
    rows=None,
  )
  whole = make()
  monkeypatch.setattr('gsae_jax.lm.packing._DOCUMENTS', together)
  parts = make()
  for name in ('ids_CL', 'mask_CL', 'special_CL', 'documents_CL'):
    np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


@pytest.mark.parametrize('packing', ['stream', 'documents'])
@pytest.mark.parametrize('window', [1, 7, 50, 10_000])
def test_windows_are_the_contexts_in_pieces(packing, window, tokenizer):
  policy = {
    'context_length': 32,
    'packing': packing,
    'prepend_bos': True,
    'special_tokens': 'drop',
    'rows': 5000,
  }
  texts = golden_text.documents()
  whole = text.pack(texts, tokenizer, **policy)
  found = list(text.windows(texts, tokenizer, **policy, window=window))
  sizes = [len(w) for w in found]
  assert sizes[:-1] == [window] * (len(sizes) - 1) and sizes[-1] <= window
  assert (len(found) > 1) == (window < 100)
  for name in ('ids_CL', 'mask_CL', 'special_CL', 'documents_CL'):
    got = np.concatenate([getattr(w, name) for w in found])
    np.testing.assert_array_equal(got, getattr(whole, name))
  # Of some contexts, the same as of all.
  chosen_C = np.array([5, 0, 3]) % len(found[0])
  np.testing.assert_array_equal(
    found[0].documents(chosen_C), whole.documents_CL[chosen_C]
  )
  np.testing.assert_array_equal(found[0].counted(), found[0].mask_CL.sum(1))


def test_a_part_of_contexts_knows_its_documents(tokenizer):
  contexts = pack(golden_text.documents(), tokenizer, rows=3000)
  for start, stop in ((0, 3), (17, 18), (40, len(contexts))):
    part = contexts.part(start, stop)
    want = contexts.documents_CL[start:stop]
    np.testing.assert_array_equal(part.documents_CL, want)
    assert part.starts_R[0] == 0 and len(part.starts_R) <= np.size(want)


def test_tokens_are_not_kept_in_memory(tokenizer):
  contexts = pack(golden_text.documents(), tokenizer, rows=3000)
  assert isinstance(contexts.ids_CL.base, np.memmap)
  runs = contexts.starts_R.nbytes + contexts.documents_R.nbytes
  assert runs < 0.2 * contexts.ids_CL.nbytes


def test_tokens_are_not_kept_in_memory_while_they_are_collected(tokenizer):
  block = pack(golden_text.documents(), tokenizer, rows=30_000)
  held = Held(16)
  tracemalloc.start()
  for _ in range(20):
    ids_CL = np.array(block.ids_CL)
    held.add(dataclasses.replace(block, ids_CL=ids_CL))
    del ids_CL
  kept, _ = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  held.close()
  assert kept < 20 * block.ids_CL.size  # Bytes.


def test_nowhere_to_keep_tokens_is_a_line(tokenizer, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('tempfile.TemporaryFile', full)
  with pytest.raises(UserError, match='No space left on device.*TMPDIR'):
    pack(golden_text.documents(), tokenizer)


def test_keep_counts_special_tokens_too(tokenizer):
  contexts = pack(['import os\n' * 300], tokenizer, special_tokens='keep')
  assert contexts.mask_CL.all() and contexts.special_CL[:, 0].all()


def test_too_little_text_and_too_little_tokenizer(tokenizer, tmp_path):
  with pytest.raises(
    UserError, match='has 15 usable tokens in full contexts of 16'
  ):
    pack(['pass\n' * 10], tokenizer)
  for texts in (['x'], []):
    with pytest.raises(UserError, match='has 0 usable tokens in full contexts'):
      pack(texts, tokenizer)
  with pytest.raises(UserError, match="no file matches '.*nothing.*'"):
    text.read_documents(str(tmp_path / 'nothing*'), None)
  (tmp_path / 'empty').write_text(' \n')
  with pytest.raises(UserError, match='no text in'):
    text.read_documents(str(tmp_path / 'empty'), None)

  class NoBos:
    bos_id = None
    special_ids = ()

  with pytest.raises(UserError, match='names no bos_token; set it to False'):
    pack(['a'], NoBos())


def test_bos_with_id_zero_is_a_bos(tokenizer):
  assert tokenizer.bos_id == 0 and tokenizer.special_ids == (0,)


def test_text_survives_a_round_trip(tokenizer):
  source = 'def é(x):\n\treturn "日本" + x  # naïve\r\n'
  assert tokenizer.decode(tokenizer.encode([source])[0]) == source


def test_the_standard_library_is_there_without_its_tests():
  documents = text.read_documents('stdlib', None)
  assert len(documents.texts) > 200
  assert sum(map(len, documents.texts)) > 4_000_000
  assert not any('class CompatTestCase' in t for t in documents.texts)


@pytest.mark.parametrize('packing', ['stream', 'documents'])
@pytest.mark.parametrize('stride', [2, 3, 7])
def test_every_so_manieth_context_is_taken(packing, stride, embedded):
  texts = [
    f'{word} = {i}\n' * (5 + 40 * (i % 3))
    for i, word in enumerate('abcdefghijkl' * 60)
  ]
  settings = {
    'context_length': 16,
    'packing': packing,
    'prepend_bos': True,
    'special_tokens': 'drop',
  }
  whole = text.pack(texts, embedded.tokenizer, rows=None, **settings)
  taken = text.pack(
    texts, embedded.tokenizer, rows=500, stride=stride, **settings
  )
  count = len(taken)
  assert 500 <= taken.mask_CL.sum() < 516
  for name in ('ids_CL', 'documents_CL', 'mask_CL'):
    want = getattr(whole, name)[::stride][:count]
    np.testing.assert_array_equal(getattr(taken, name), want)
  with pytest.raises(UserError, match=f'leaves out {stride - 1} of {stride}'):
    text.pack(texts, embedded.tokenizer, rows=10**6, stride=stride, **settings)
