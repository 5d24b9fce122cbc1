"""Rows of a text that is tokenised window by window."""

import threading

import numpy as np
import pytest

from gsae_jax.activations.windows import Windows
from gsae_jax.errors import Preempted, UserError
from gsae_jax.lm import text
from gsae_jax.lm.documents import locate
from tests.support import golden_text
from tests.support.sources import (
  SITES,
  activations_of,
  buffer,
  same,
  source,
)

SETTINGS = {
  'separator': '<sep>',
  'field': 'text',
  'subset': None,
  'split': 'train',
  'revision': None,
  'order': 'source',
  'window': 20,
  'context_length': 32,
  'packing': 'stream',
  'prepend_bos': True,
  'special_tokens': 'drop',
  'held_out': 0.1,
}
ROWS = 5000


@pytest.fixture(scope='module')
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp('text') / 'golden.txt'
  path.write_text('<sep>'.join(golden_text.documents()), newline='')
  return str(path)


def prepare(lm, file, rows=ROWS, **changes):
  settings = SETTINGS | {'path': file} | changes
  return text.prepare(settings, lm.tokenizer, part='train', rows=rows)


def make(lm, file, *, buffer_rows=700, rows=ROWS, seed=3, **changes):
  windows = prepare(lm, file, rows, **changes).windows
  return source(lm, windows, rows=rows, buffer_rows=buffer_rows, seed=seed)


@pytest.fixture(scope='module')
def whole(embedded, file):
  """Every buffer, one after the other."""
  one = make(embedded, file)
  return [buffer(one, i) for i in range(one.buffers)]


@pytest.mark.parametrize(
  'epoch, digest, rows',
  [
    (0, '4a7e2d790dcdad4f', '53e9ef52b9c7516f'),
    (1, '76e431423550dcbe', 'aecaa09fb615a173'),
  ],
)
@pytest.mark.parametrize('window', [None, 10_000])
def test_one_window_has_the_rows_that_there_have_always_been(
  epoch, digest, rows, window, embedded, file
):
  one = make(
    embedded, file, rows=9000, buffer_rows=4096, order='hash', window=window
  )
  one.set_epoch(epoch)
  assert one.digest().startswith(digest)
  names = 'token_ids', 'positions', 'context_ids', 'document_ids', 'special'
  buffers = [buffer(one, i) for i in range(3)]
  assert rows == golden_text.digest(*(b[n] for b in buffers for n in names))


def test_rows_come_window_by_window_and_each_once(embedded, file, whole):
  contexts = text.pack(
    text.split(
      text.Documents(tuple(locate(file, '<sep>')()), ''), 0.1, 'train'
    ),
    embedded.tokenizer,
    context_length=32,
    packing='stream',
    prepend_bos=True,
    special_tokens='drop',
    rows=ROWS,
  )
  stored = {k: np.concatenate([b[k] for b in whole]) for k in whole[0]}
  where = stored['context_ids'], stored['positions']
  for name, array_CL in (
    ('token_ids', contexts.ids_CL),
    ('special', contexts.special_CL),
    ('document_ids', contexts.documents_CL),
  ):
    np.testing.assert_array_equal(stored[name], array_CL[where])
  assert contexts.mask_CL[where].all()
  assert (
    len(np.unique(stored['context_ids'] * 32 + stored['positions'])) == ROWS
  )
  taken = activations_of(embedded, contexts)
  for site in SITES:
    want = np.asarray(taken[site])[where]
    np.testing.assert_allclose(stored[site], want, atol=1e-4)
  # Buffers straddle windows; each has rows of those that it covers alone.
  ends = np.cumsum(contexts.mask_CL[:160].reshape(8, -1).sum(1))
  for number, b in enumerate(whole):
    first, last = np.searchsorted(
      ends, [number * 700, number * 700 + 699], 'right'
    )
    found = set((b['context_ids'] // 20).tolist())
    assert found == set(range(first, last + 1))
  assert any(np.ptp(b['context_ids'] // 20) for b in whole)


def test_any_buffer_can_be_made_at_any_time(embedded, file, whole):
  one = make(embedded, file)
  for i in (6, 2, 7, 7, 0, 3):  # Forth and back.
    assert same(buffer(one, i), whole[i])
  other = make(embedded, file)  # As a harvest that goes on.
  assert same(buffer(other, 5), whole[5])


def test_the_shares_of_two_are_the_buffers_of_one(embedded, file, whole):
  for p in range(2):
    share = make(embedded, file)
    for i in range(p, len(whole), 2):
      assert same(buffer(share, i), whole[i])


def test_epochs_and_encodings_start_from_the_beginning(embedded, file, whole):
  one = make(embedded, file)
  digest, encodings = one.digest(), one.encodings()
  buffer(one, 7)
  assert one.digest() == digest  # Of the first window, wherever it is.
  np.testing.assert_array_equal(
    one.encodings()['mlp_out.0'].mean_D, encodings['mlp_out.0'].mean_D
  )
  one.set_epoch(1)
  other = buffer(one, 0)
  assert not np.array_equal(other['context_ids'], whole[0]['context_ids'])
  one.set_epoch(0)
  assert same(buffer(one, 0), whole[0])


def test_windows_of_other_sizes_have_other_rows(embedded, file, whole):
  other = buffer(make(embedded, file, window=40), 0)
  assert not np.array_equal(other['context_ids'], whole[0]['context_ids'])
  assert (
    make(embedded, file, window=40).digest() != make(embedded, file).digest()
  )


def test_too_little_text_is_found_at_its_end(embedded, file):
  usable = len(buffer(make(embedded, file), 0)['token_ids'])
  one = make(embedded, file, rows=10**6)
  assert len(buffer(one, 0)['token_ids']) == usable
  with pytest.raises(
    UserError, match='has [0-9]{6} usable tokens in full .* 1000000 are asked'
  ):
    buffer(one, 1400)


def threads():
  return [t for t in threading.enumerate() if t.name == 'text']


def test_no_thread_stays(embedded, file):
  one = make(embedded, file, buffer_rows=500)
  one.close()
  assert not threads()
  assert len(buffer(one, 0)['token_ids']) == 500  # Of the window in hand.
  one = make(embedded, file)
  del one  # Forgotten.
  assert not threads()


def test_one_may_leave_between_windows(embedded, file):
  def leave():
    raise Preempted

  windows = Windows(prepare(embedded, file).windows, 0, 0)
  with pytest.raises(Preempted):
    list(windows.covering(4000, 4100, leave))


def test_each_window_has_an_order_of_its_own(embedded, file):
  orders = set()
  for epoch in (0, 1):
    windows = Windows(prepare(embedded, file).windows, 0, epoch)
    found = list(windows.covering(0, 2000, lambda: None))
    assert [w.first_context for w in found] == [0, 20, 40, 60]
    for window in found:
      assert sorted(window.order_C) == list(range(20))
      orders.add(tuple(window.order_C))
  assert len(orders) == 8


@pytest.mark.parametrize('order', ['hash', 'source'])
def test_identity_of_the_documents_is_of_all_that_were_read(
  order, embedded, file
):
  documents = text.read_documents(file, '<sep>')
  prepared = prepare(embedded, file, order=order)
  want = {'hash': documents.digest, 'source': None}
  assert prepared.documents == want[order]
