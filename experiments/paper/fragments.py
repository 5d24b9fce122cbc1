"""Pieces of HTML that the figures here are put together from."""

import html
from collections.abc import Sequence

from gsae_jax.evaluation.frontiers import Estimate


def section(title: str, lead: str, *parts: str) -> str:
  return (
    f'<h2>{html.escape(title)}</h2><p class="lead">{html.escape(lead)}</p>'
    + ''.join(parts)
  )


def side_by_side(*frames: str) -> str:
  return f'<div class="figures">{"".join(frames)}</div>'


def table(
  head: Sequence[str], rows: Sequence[Sequence[str]], *, wrapped: bool = False
) -> str:
  """Cells are plain text; `wrapped` is for those that hold sentences."""
  line = lambda cells, tag: (
    '<tr>'
    + ''.join(f'<{tag}>{html.escape(c)}</{tag}>' for c in cells)
    + '</tr>'
  )
  kind = ' class="wrapped"' if wrapped else ''
  body = ''.join(line(row, 'td') for row in rows)
  return (
    f'<div class="scroll"><table{kind}><thead>{line(head, "th")}</thead>'
    f'<tbody>{body}</tbody></table></div>'
  )


def shown(estimate: Estimate | None) -> str:
  return '–' if estimate is None else str(estimate)
