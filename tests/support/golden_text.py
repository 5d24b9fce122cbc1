"""Text that is the same on every machine, and digests of what is made of it."""

import hashlib
import itertools

import numpy as np

WORDS = (
  'def ', 'x', ' = ', 'é', '日本 ', 'return ', 'import os\n', '(self)',
  ' for i in range(3):\n', '# naïve\r\n', '<|bos|>', ' ',
)  # fmt: skip

POLICIES = tuple(
  itertools.product(('stream', 'documents'), (True, False), ('drop', 'keep'))
)


def documents(count=300):
  """Some of a few tokens, some of many contexts; the first ten twice."""
  out = []
  for i in range(count):
    words = [
      WORDS[(j * j * (i + 3) + j * i // 7) % len(WORDS)]
      for j in range(2 + 37 * i % 211 * (1 + (i % 5 == 0)))
    ]
    out.append(f'{i}' + ''.join(words))
  return out + out[:10]


def digest(*arrays):
  found = hashlib.sha256()
  for array in arrays:
    found.update(np.ascontiguousarray(array))
  return found.hexdigest()[:16]
