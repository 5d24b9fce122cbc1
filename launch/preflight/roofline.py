"""What bounds a program: what it asks of a chip, over what the chip has."""

import dataclasses
import math

import numpy as np

from gsae_jax.evaluation.figures import LEFT, TOP, Series, figure

GB, GIB = 1e9, 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """What the vendor says, https://cloud.google.com/tpu/docs/v5e (v5p, v6e).

  Attributes:
    flops: of bfloat16, a second.
    memory: bytes.
    usable: of the memory, what the compiler gives to programs.
    bandwidth: of the memory, bytes a second.
    network: bytes a second that leave a chip on all of its links together.
    links: of a chip.
    ring: an axis of the network closes to a ring where it has a multiple of so
      many chips.
    cubes: it does only where all axes have, because the network is of cubes, and
      part of one has no way around.
  """

  flops: float
  memory: float
  usable: float
  bandwidth: float
  network: float
  links: int
  ring: int
  cubes: bool


CHIPS = {
  'v5e': Chip(
    197e12, 16 * GB, 15.75 * GIB, 819 * GB, 1600 * GB / 8, 4, 16, False
  ),
  'v5p': Chip(
    459e12, 95 * GB, 95.74 * GIB, 2765 * GB, 4800 * GB / 8, 6, 4, True
  ),
  'v6e': Chip(
    918e12, 32 * GB, 31.25 * GIB, 1640 * GB, 3584 * GB / 8, 4, 16, False
  ),
}


def best_split(chips: int, features: int, batch: int) -> tuple[int, int]:
  """`data` and `model` that send least: sums over either go over the other.

  A chip sends `batch / data` rows of reconstructions over 'model', and
  `features / model` rows of gradients over 'data', two of `D` numbers each.
  Least is `model = sqrt(chips * features / batch)`, or all chips.
  """
  ring = lambda n: (n - 1) / n
  sent = lambda data, model: (
    ring(model) * batch / data + ring(data) * features / model
  )
  splits = [
    (chips // m, m)
    for m in range(1, chips + 1)
    if chips % m == features % m == batch % (chips // m) == 0
  ]
  return min(splits, key=lambda split: (sent(*split), split))


def wire_bytes(kind: str, size: float, devices: int) -> float:
  """Bytes that a device sends at least, along a ring of all that take part.

  Args:
    kind: of collective.
    size: what comes out of it, on a device.
    devices: that take part.
  """
  if kind == 'collective-permute':
    return float(size)
  part = (devices - 1) / devices
  factors = {
    'all-reduce': 2 * part,
    'all-gather': part,
    'reduce-scatter': devices - 1,
    'all-to-all': part,
  }
  return factors[kind] * size


def _closed(bounds: tuple[int, ...], chip: Chip) -> list[bool]:
  """Whether each axis of the network is a ring."""
  closed = [n % chip.ring == 0 for n in bounds]
  if chip.cubes and not all(closed):
    closed = [False] * len(bounds)
  return closed


def links(coordinates: np.ndarray, bounds: tuple[int, ...], chip: Chip) -> int:
  """Links of a chip that a collective can send on at the same time.

  Args:
    coordinates: `[devices, axes]` places in the network of those that take part.
    bounds: chips along each axis of the network.
    chip: of what kind they are.

  Returns:
    two for each axis that they go all around, one for each that they do not.
  """
  closed = _closed(bounds, chip)
  count = 0
  for taken_N, chips, around in zip(
    coordinates.T, bounds, closed, strict=False
  ):
    taken = len(set(taken_N.tolist()))
    if taken > 1:
      count += 2 if around and taken == chips else 1
  return count


def network_seconds(
  kind: str,
  size: float,
  groups: np.ndarray,
  bounds: tuple[int, ...],
  chip: Chip,
) -> float:
  """Of a collective that all groups have at the same time.

  Args:
    kind: of collective.
    size: what comes out of it, on a device.
    groups: `[groups, devices, axes]` places in the network.
    bounds: chips along each axis of the network.
    chip: of what kind they are.

  Returns:
    what a group takes that has its links for itself, or, where groups lie across each
    other, what the fewest links between two parts of the network take.
  """
  link = chip.network / chip.links
  alone = wire_bytes(kind, size, groups.shape[1])
  alone /= links(groups[0], bounds, chip) * link
  across = [
    sum(_across(kind, size, side) for side in sides) / (count * link)
    for sides, count in _cuts(groups, bounds, chip)
  ]
  return max([alone, *across])


def _cuts(groups: np.ndarray, bounds: tuple[int, ...], chip: Chip):
  """Ways to cut the network in two: who is on one side, and links between."""
  for axis, (n, around) in enumerate(
    zip(bounds, _closed(bounds, chip), strict=True)
  ):
    count = math.prod(bounds) // n
    for start in range(n // 2 if around else n - 1):
      at = groups[..., axis]
      if around:
        yield (at - start) % n < n // 2, 2 * count
      else:
        yield at <= start, count


def _across(kind: str, size: float, side: np.ndarray) -> float:
  """Bytes that a group sends at least from one side to the other, that way more."""
  devices, here = len(side), int(side.sum())
  there = devices - here
  if not here or not there:
    return 0.0
  larger = max(here, there)
  return (
    float(size)
    * {
      'all-reduce': 1,
      'all-gather': larger / devices,
      'reduce-scatter': larger,
      'all-to-all': here * there / devices,
      'collective-permute': 1,
    }[kind]
  )


def predict(seconds: dict[str, float], tokens: int) -> dict:
  """Which time is longest, and tokens per second with and without overlap."""
  return {
    'bound': max(seconds, key=seconds.__getitem__),
    'tokens_per_second': {
      'overlapped': tokens / max(seconds.values()),
      'one_after_the_other': tokens / sum(seconds.values()),
      'compute_alone': tokens / seconds['compute'],
    },
  }


_STYLE = """<style>
svg { font-family: system-ui, sans-serif; background: #fff }
.grid { stroke: #dfe4ec } .tick { fill: #5b6778; font-size: 12px }
.axis { fill: #16202e; font-size: 13px } .key { font-size: 13px }
.s-v5e { color: #1f6feb } .s-v5p { color: #d9730d } .s-v6e { color: #7a52cc }
polyline { fill: none; stroke: currentColor; stroke-width: 2 }
polyline.dashed { stroke-dasharray: 6 4; stroke-width: 1.2 }
polygon { fill: currentColor; opacity: .15 }
circle, .key { fill: currentColor }
</style>"""


def _best(rows: list[dict], generation: str) -> dict[tuple[int, int], dict]:
  """The fastest mesh for a number of chips and of SAEs at once."""
  best: dict[tuple[int, int], dict] = {}
  for row in rows:
    if row['topology'].startswith(generation) and 'seconds' in row:
      key = row['mesh']['sae'], row['chips']
      rate = lambda r: r['tokens_per_second']['overlapped']
      best[key] = max(best.get(key, row), row, key=rate)
  return dict(sorted(best.items()))


def draw(rows: list[dict]) -> str:
  """Tokens per second against chips, as an SVG file."""
  series, keys = [], []
  for style in CHIPS:
    best = _best(rows, style)
    alone = [row for (sae, _), row in best.items() if sae == 1]
    several = [row for (sae, _), row in best.items() if sae > 1]
    at = lambda rows, name: [
      (
        row['chips'],
        row['tokens_per_second'][name],
        f'{row["topology"]}, {row["mesh"]}, bound by {row["bound"]}',
      )
      for row in rows
    ]
    between = ('one_after_the_other', 'overlapped')
    ends = zip(*(at(alone, name) for name in between), strict=True)
    band = [(low[0], low[1], high[1]) for low, high in ends]
    if alone:
      keys.append(style)
    series += [
      Series(style, style, at(alone, 'overlapped'), band=band),
      Series('', style, at(alone, 'compute_alone'), dots=False, dashed=True),
      Series('', style, at(several, 'overlapped'), line=False, opacity=0.6),
    ]
  body = figure(
    series,
    x_label='chips',
    y_label='tokens per second',
    title='Predicted tokens per second against chips',
    log_x=True,
    log_y=True,
  ).partition('</svg>')[0]
  legend = ''.join(
    f'<text class="key s-{style}" x="{LEFT + 12}" y="{TOP + 20 + 18 * i}">'
    f'{style}</text>'
    for i, style in enumerate(keys)
  )
  head = '<svg xmlns="http://www.w3.org/2000/svg" '
  return f'{head}{body.removeprefix("<svg ")}\n{_STYLE}{legend}</svg>\n'
