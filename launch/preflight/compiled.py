"""Reads the text of a compiled program: what it sends, and what it moves."""

import dataclasses
import functools
import math
import re
from typing import Any

import numpy as np

_INSTRUCTION = re.compile(
  r'\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>.*?) '
  r'(?P<operation>[\w\-]+)\((?P<rest>.*)'
)
_HEADER = re.compile(r'(?P<entry>ENTRY )?%(?P<name>[\w.\-]+) .*\{$')
_COLLECTIVE = re.compile(
  r'(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|'
  r'collective-permute)(?P<start>-start)?'
)
_CALLED = re.compile(r'(calls|to_apply|body|condition)=%([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_GROUPS = re.compile(
  r'(?:replica_groups|source_target_pairs)=(.*?)(?:, \w+=(?!\()|$)'
)
_NAMED_AXES = re.compile(
  r'mesh\[(?P<sizes>[^]]*)\](?:, device_ids=\((?P<ids>.*)\))? \{(?P<axes>.*)\}'
)
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\](\{[^}]*\})?')
_BYTES = {
  'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2,
  'pred': 1, 's8': 1, 'u8': 1,
}  # fmt: skip
# These only name what is there, or end what has been counted at its start.
_FREE = re.compile(
  r'parameter|constant|tuple|get-tuple-element|bitcast|.*-done'
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """Of one channel.

  Attributes:
    kind: 'all-reduce', 'all-gather', ...
    size: bytes that come out of it, on a chip.
    groups: which devices take part, as the compiler writes it.
    times: that it runs, in loops.
  """

  kind: str
  size: int
  groups: str
  times: int = 1


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  operation: str
  rest: str
  root: bool

  @functools.cached_property
  def operands(self) -> list[str]:
    return re.findall(r'%([\w.\-]+)', self.rest.partition(')')[0])

  @functools.cached_property
  def called(self) -> dict[str, str]:
    """Computations that it calls, by what for."""
    found = dict(_CALLED.findall(self.rest))
    branches = _BRANCHES.search(self.rest)
    for i, name in enumerate(branches[1].split(',') if branches else ()):
      found[f'branch {i}'] = name.strip(' %')
    return found

  @property
  def outside(self) -> int:
    """Bytes of it in the chip's memory, not on the chip itself ('S(1)')."""
    return sum(n for n, layout in _arrays(self.shape) if 'S(' not in layout)


class Text:
  """A compiled program's text."""

  def __init__(self, text: str):
    self._computations: dict[str, list[_Instruction]] = {}
    self._entry = ''
    for line in text.splitlines():
      header = _HEADER.match(line)
      if header:
        here = self._computations.setdefault(header['name'], [])
        self._entry = header['name'] if header['entry'] else self._entry
        continue
      match = _INSTRUCTION.match(line)
      if match:
        fields: dict[str, Any] = match.groupdict()
        fields['root'] = bool(fields['root'])
        here.append(_Instruction(**fields))

  def collectives(self) -> list[Collective]:
    """What it sends.

    The compiler spreads one over several computations; its channel is one.
    """
    found: dict[str, Collective] = {}
    times = self._times()
    for computation, instructions in self._computations.items():
      for one in instructions:
        match = _COLLECTIVE.fullmatch(one.operation)
        channel = re.search(r'channel_id=(\d+)', one.rest)
        if not match or not channel:
          continue
        sizes = [size for size, _ in _arrays(one.shape)]
        groups = _GROUPS.search(one.rest)
        before = found.get(channel[1])
        found[channel[1]] = Collective(
          match['kind'],
          _result(match['kind'], bool(match['start']), sizes),
          groups[1] if groups else '{}',
          max(times.get(computation, 1), before.times if before else 1),
        )
    return list(found.values())

  def _times(self) -> dict[str, int]:
    """How often each computation runs."""
    times: dict[str, int] = {}

    def visit(computation, count):
      times[computation] = max(times.get(computation, 0), count)
      for one in self._computations.get(computation, ()):
        for role, name in one.called.items():
          visit(name, count * (self._turns(one) if role == 'body' else 1))

    visit(self._entry, 1)
    return times

  def _turns(self, loop: _Instruction) -> int:
    """Of a loop: the bound that its counter is held against."""
    condition = self._computations[loop.called['condition']]
    bounds = [
      int(one.rest.partition(')')[0])
      for one in condition
      if one.operation == 'constant' and one.shape.startswith('s32[]')
    ]
    return max(bounds, default=1)

  def memory_bytes(self) -> float:
    """Bytes that it reads from a chip's memory and writes to it.

    What `cost_analysis` calls bytes accessed counts what lies on the chip itself
    too, copies between the two once at each end, and the body of a loop once.
    """
    return self._moved(self._entry)

  def _moved(self, computation: str) -> float:
    instructions = self._computations[computation]
    named = {one.name: one for one in instructions}
    total: float = 0
    for one in instructions:
      if _FREE.fullmatch(one.operation):
        continue
      if one.operation == 'while':
        total += self._turns(one) * self._moved(one.called['body'])
      elif one.operation in ('conditional', 'call'):
        total += max(map(self._moved, one.called.values()))
      elif one.operation.endswith('-start'):
        # In or out, once: of a slice, what is taken.
        sizes = (n for n, layout in _arrays(one.shape) if 'S(2)' not in layout)
        total += min(sizes, default=0)
      else:
        total += self._written(one, named) + sum(
          min(named[operand].outside, self._read(one, i))
          for i, operand in enumerate(one.operands)
          if operand in named
        )
    return total

  def _read(self, one: _Instruction, i: int) -> float:
    """Bytes that an instruction reads of an operand, at most."""
    if one.operation in ('dynamic-slice', 'gather') and i == 0:
      return _size(one.shape)
    if one.operation == 'dynamic-update-slice' and i == 0:
      return 0
    if one.operation != 'fusion':
      return math.inf
    inside = self._computations.get(one.called['calls'], [])
    names = [
      x.name
      for x in inside
      if x.operation == 'parameter' and x.rest.startswith(f'{i})')
    ]
    return self._used(inside, names[0]) if names else math.inf

  def _used(self, inside: list[_Instruction], name: str) -> float:
    total: float = 0
    for user in inside:
      for i, operand in enumerate(user.operands):
        if operand == name:
          alias = user.operation == 'bitcast'
          total += (
            self._used(inside, user.name) if alias else self._read(user, i)
          )
    return total

  def _written(self, one: _Instruction, around: dict[str, _Instruction]) -> int:
    """Bytes that an instruction writes."""
    within = self._computations.get(one.called.get('calls', ''))
    last, named = one, around
    if within:
      named = {x.name: x for x in within}
      last = next(x for x in within if x.root)
    while last.operation == 'bitcast':
      last = named[last.operands[0]]
    if last.operation != 'dynamic-update-slice':
      return one.outside
    return min(one.outside, _size(named[last.operands[1]].shape))


def _result(kind: str, starts: bool, sizes: list[int]) -> int:
  """Bytes that come out of a collective, of all arrays of its shape."""
  if not starts or kind == 'all-reduce':
    return sum(sizes)
  # The start of others names what goes in, too, and handles.
  arrays = [size for size in sizes if size > 4]
  return sum(arrays[len(arrays) // 2 :])


def _size(shape: str) -> int:
  return sum(size for size, _ in _arrays(shape))


def _arrays(shape: str) -> list[tuple[int, str]]:
  """Bytes and layout of each array of a shape, which may be a tuple."""
  return [
    (_BYTES[dtype] * math.prod(int(n) for n in dims.split(',') if n), layout)
    for dtype, dims, layout in _ARRAY.findall(shape)
    if dtype in _BYTES
  ]


def groups_of(groups: str, count: int) -> np.ndarray:
  """Numbers of the devices of each group, in the order of the mesh, `[groups, n]`.

  Args:
    groups: of a `Collective`; the compiler has three ways to write them.
    count: of all devices.

  Raises:
    ValueError: it has a fourth.
  """
  everyone = np.arange(count)
  if groups.startswith('{'):
    found = re.findall(r'\d[\d,]*', groups)
    return (
      np.array([[int(n) for n in one.split(',')] for one in found])
      if found
      else everyone[None]
    )
  if listed := re.match(r'\[\d+,(\d+)\]<=', groups):
    size = int(listed[1])
    return _permuted(groups.partition('<=')[2], everyone).reshape(-1, size)
  named = _NAMED_AXES.fullmatch(groups)
  axes = re.findall(r"'(\w+)'(?=,|$)", named['axes']) if named else []
  if not named or len(axes) != named['axes'].count(',') + 1:
    raise ValueError(f'groups of a form that is not known: {groups}')
  sizes = dict(re.findall(r"'(\w+)'=(\d+)", named['sizes']))
  ids = _permuted(named['ids'], everyone) if named['ids'] else everyone
  ids = ids.reshape([int(n) for n in sizes.values()])
  order = sorted(range(len(sizes)), key=lambda i: list(sizes)[i] in axes)
  members = math.prod(int(sizes[a]) for a in axes)
  return ids.transpose(order).reshape(-1, members)


def _permuted(text: str, ids: np.ndarray) -> np.ndarray:
  """`[2,4]T(1,0)` of device numbers, flat."""
  shape, _, order = text.partition('T')
  numbers = lambda s: [int(n) for n in re.findall(r'\d+', s)]
  ids = ids.reshape(numbers(shape))
  return (ids.transpose(numbers(order)) if order else ids).ravel()


def axes_of(group: np.ndarray, sizes: dict[str, int]) -> tuple[str, ...]:
  """Axes of the mesh along which the devices of a group differ."""
  places = np.unravel_index(group, tuple(sizes.values()))
  return tuple(
    name
    for name, along in zip(sizes, places, strict=True)
    if len(set(along.tolist())) > 1
  )
