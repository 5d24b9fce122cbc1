"""Line and point figures as SVG text: no dependency, no script, no fetch.

Colours come from the page's style sheet by class (`s-gated`, `s-relu`, ...), so
that a figure follows the reader's light or dark theme.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 560, 360
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 48
_LARGEST = 3.4e38


@dataclasses.dataclass(frozen=True)
class Series:
  """Points of one kind.

  Attributes:
    label: for the legend; series of equal label share an entry.
    style: CSS class suffix.
    points: x, y and a hover text.
    line: joins the points.
    dots: marks them.
    opacity: 0 to 1.
    band: x, lower and upper y of an interval, in order of x.
    dashed: breaks the line up.
  """

  label: str
  style: str
  points: Sequence[tuple[float, float, str]]
  line: bool = True
  dots: bool = True
  opacity: float = 1.0
  band: Sequence[tuple[float, float, float]] = ()
  dashed: bool = False


class Axis:
  """Maps values to pixels."""

  def __init__(
    self, values: Sequence[float], log: bool, first: float, last: float
  ):
    self.log = log
    low, high = min(values), max(values)
    if log:
      low, high = math.log10(low), math.log10(high)
    pad = 0.06 * (high - low) or 0.05 * abs(high)
    self._low, self._high = low - pad, high + pad
    if pad < 1e-300:  # Zero all along, or as good as: the axis goes up from it.
      self._low, self._high = -0.06, 1.06
    self._first, self._last = first, last

  def __call__(self, value: float) -> float:
    value = math.log10(value) if self.log else value
    part = (value - self._low) / (self._high - self._low)
    return self._first + part * (self._last - self._first)

  def ticks(self) -> list[float]:
    """Round values in range, about six."""
    if self.log:
      return self._log_ticks()
    step = 10 ** math.floor(math.log10((self._high - self._low) / 5))
    step *= next(
      m for m in (1, 2, 5, 10) if (self._high - self._low) / (m * step) <= 6
    )
    start = math.ceil(self._low / step)
    stop = math.floor(self._high / step)
    return [i * step for i in range(start, stop + 1)]

  def _log_ticks(self) -> list[float]:
    decades = range(math.floor(self._low), math.ceil(self._high) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), range(1, 10)):
      values = [d * 10.0**e for e in decades for d in digits]
      kept = [
        v for v in values if v and self._low <= math.log10(v) <= self._high
      ]
      if len(kept) >= 4:
        break
    return kept


def has_place(value: object) -> bool:
  """Whether a value is a number that an axis has a place for.

  Those are finite and no larger than a float32 holds: training and evaluation
  give no others.
  """
  if not isinstance(value, int | float) or isinstance(value, bool):
    return False
  return abs(value) <= _LARGEST  # False for NaN too.


def number(value: float) -> str:
  """A tick's label."""
  if value == 0:
    return '0'
  if abs(value) >= 1e6:
    return f'{value / 1e6:g}M'
  if abs(value) >= 1e4:
    return f'{value / 1e3:g}k'
  return f'{value:.6g}'


def figure(
  series: Sequence[Series],
  *,
  x_label: str,
  y_label: str,
  title: str,
  log_x: bool = False,
  log_y: bool = False,
  guide: float | None = None,
) -> str:
  """An SVG figure with axes, grid, legend, and hover texts on the points.

  Args:
    series: what to draw; empty ones are left out.
    x_label: name of the x axis.
    y_label: name of the y axis.
    title: read out by screen readers.
    log_x: logarithmic x axis; points at or below 0 are left out.
    log_y: the same for y.
    guide: draws a horizontal line at this value.
  """
  series = [_positive(s, log_x, log_y) for s in series]
  series = [s for s in series if s.points]
  if not series:
    return '<p class="empty">Nothing to draw yet.</p>'
  xs = [x for s in series for x, _, _ in s.points]
  ys = [y for s in series for _, y, _ in s.points]
  for s in series:
    xs += [x for x, _, _ in s.band]
    ys += [y for _, *bounds in s.band for y in bounds]
  x = Axis(xs, log_x, LEFT, WIDTH - RIGHT)
  y = Axis(
    ys + ([guide] if guide is not None else []), log_y, HEIGHT - BOTTOM, TOP
  )
  parts = [
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    f'<title>{html.escape(title)}</title>',
    *_grid(x, y, x_label, y_label),
  ]
  if guide is not None:
    parts.append(
      f'<line class="guide" x1="{LEFT}" x2="{WIDTH - RIGHT}" '
      f'y1="{y(guide):.1f}" y2="{y(guide):.1f}"/>'
    )
  for s in series:
    parts += _draw(s, x, y)
  parts.append('</svg>')
  return '\n'.join([*parts, _legend(series)])


def _positive(s: Series, log_x: bool, log_y: bool) -> Series:
  points = [
    p for p in s.points if (p[0] > 0 or not log_x) and (p[1] > 0 or not log_y)
  ]
  band = [
    b for b in s.band if (b[0] > 0 or not log_x) and (b[1] > 0 or not log_y)
  ]
  return dataclasses.replace(s, points=points, band=band)


def _grid(x: Axis, y: Axis, x_label: str, y_label: str) -> list[str]:
  parts = []
  bottom = HEIGHT - BOTTOM
  for t in x.ticks():
    parts.append(
      f'<line class="grid" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{TOP}" '
      f'y2="{bottom}"/><text class="tick" x="{x(t):.1f}" y="{bottom + 17}" '
      f'text-anchor="middle">{number(t)}</text>'
    )
  for t in y.ticks():
    parts.append(
      f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" '
      f'y2="{y(t):.1f}"/><text class="tick" x="{LEFT - 8}" '
      f'y="{y(t) + 4:.1f}" text-anchor="end">{number(t)}</text>'
    )
  middle = (TOP + bottom) / 2
  parts.append(
    f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" '
    f'text-anchor="middle">{html.escape(x_label)}</text>'
    f'<text class="axis" transform="translate(14 {middle}) rotate(-90)" '
    f'text-anchor="middle">{html.escape(y_label)}</text>'
  )
  return parts


def _draw(s: Series, x: Axis, y: Axis) -> list[str]:
  style = html.escape(s.style)
  at = [(x(a), y(b), text) for a, b, text in s.points]
  parts = [f'<g class="s-{style}" opacity="{s.opacity:g}">']
  if len(s.band) > 1:
    edge = [(a, low) for a, low, _ in s.band]
    edge += [(a, high) for a, _, high in reversed(s.band)]
    path = ' '.join(f'{x(a):.1f},{y(b):.1f}' for a, b in edge)
    parts.append(f'<polygon points="{path}"/>')
  if s.line and len(at) > 1:
    path = ' '.join(f'{a:.1f},{b:.1f}' for a, b, _ in at)
    dashes = ' class="dashed"' if s.dashed else ''
    parts.append(f'<polyline{dashes} points="{path}"/>')
  if s.dots:
    parts += [
      f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4.5">'
      f'<title>{html.escape(text)}</title></circle>'
      for a, b, text in at
    ]
  return [*parts, '</g>']


def _legend(series: Sequence[Series]) -> str:
  entries = dict.fromkeys((s.label, s.style) for s in series if s.label)
  items = ''.join(
    f'<span class="key"><i class="s-{html.escape(style)}"></i>'
    f'{html.escape(label)}</span>'
    for label, style in entries
  )
  return f'<div class="legend">{items}</div>'
