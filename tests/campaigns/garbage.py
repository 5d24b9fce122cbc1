"""Drawn garbage: values, JSON and bytes that nobody would write on purpose."""

import copy
import json

import numpy as np

from tests.campaigns.damages import pick

# At and beyond the bounds of what is allowed, and of wrong types.
VALUES = (
  None, True, False, 0, 1, -1, 2, 3, 7, 64, 100, 1000, 2**31, 2**32 - 1, 2**32,
  2**63, 2**64, -(2**63), 10**400, -(10**400), 0.0, -0.0, 0.5, 1.0, 1.5, -1.5,
  1e-3, 5e-324, 1e308, float('nan'), float('inf'), -float('inf'), '', ' ', 'None',
  'none', 'auto', 'gated', 'relu', 'mlp_out.0', 'float32', 'a\nb', 'a/b', '..',
  'é', '\ud800', '\x00', 'x' * 500, (), (1,), (0, 1), [1, 2], [[]], ('a',),
  ('a\nb',), (None,), ((),), {}, {'a': 1}, {'name': 'x'}, ({},), ({'name': 'x'},),
)  # fmt: skip
# Of a config file written in Python, which may hold anything.
OBJECTS = (
  b'x', 1j, np.float32(1), np.float64(1), np.int64(3), np.bool_(True),
  np.arange(3), np.zeros(()), range(3), {1, 2}, object(), int, len,
)  # fmt: skip


def places(tree, path=()):
  """Paths to everything in a tree of dictionaries and sequences, below its top."""
  items = ()
  if isinstance(tree, dict):
    items = tree.items()
  elif isinstance(tree, list):
    items = enumerate(tree)
  for key, value in items:
    yield (*path, key)
    yield from places(value, (*path, key))


def change(rng, tree, values=VALUES) -> None:
  """Puts a drawn value in a drawn place, takes it away, or adds one."""
  found = [*places(tree)]
  if not found:
    return
  *path, key = pick(rng, found)
  parent = tree
  for name in path:
    parent = parent[name]
  what = pick(rng, ['put', 'put', 'put', 'take', 'add'])
  if what == 'take':
    del parent[key]
  elif what == 'add' and isinstance(parent, dict):
    name = pick(rng, ['unknown', 'stepz', '', 'a\nb', 'name', str(key)[:-1]])
    parent[name] = copy.deepcopy(pick(rng, values))
  else:
    # Half of the time of the same type, which gets past the first check.
    alike = [v for v in values if type(v) is type(parent[key])]
    value = pick(rng, alike if alike and rng.integers(2) else values)
    parent[key] = copy.deepcopy(value)  # It may be changed where it is put.


def change_json(rng, text: str) -> str:
  """JSON with up to three drawn changes; beyond the standard, it may hold NaN."""
  tree = json.loads(text)
  for _ in range(int(rng.integers(1, 4))):
    top = [tree]
    change(rng, top)
    tree = top[0] if top else None
  return json.dumps(tree)


def change_bytes(rng, raw: bytes) -> bytes:
  """Bytes with up to three drawn changes, or others altogether."""
  for _ in range(int(rng.integers(1, 4))):
    at = int(rng.integers(len(raw) + 1))
    to = min(len(raw), at + int(rng.integers(1, 30)))
    new = pick(
      rng,
      [
        rng.bytes(int(rng.integers(1, 30))), b'', b'\n', b'\xff', b'\x00', b'0',
        b'9' * 30, b'-', b'"', b'[', b'{', b'}', b']', b',', b'NaN', b'null',
        raw[at:to] * 2,
      ],
    )  # fmt: skip
    raw = raw[:at] + new + raw[to if rng.integers(2) else at :]
  others = [b'', b'[' * 100_000, b'{"a":' * 100_000, b'9' * 5000, rng.bytes(99)]
  return pick(rng, others) if rng.random() < 0.05 else raw
