"""Which of a config's SAEs to run: `--config=experiments/gemma_7b.py:WORDS`.

WORDS have commas between them and stand in any order:

  resid_post.20   a site; several add up; `all` is every site of the config
  gated           an arm, `gated` or `relu`; without one, both
  0:4             a slice, as of a Python list, of the members that are left

Members stand by site, arm (Gated first), features, coefficient and learning rate.
Without a site the config's own default is meant. The arm and the slice leave
`sites` as it is: harvested once, a store serves every choice of its sites, each
in a workdir of its own.
"""

import re
from collections.abc import Sequence
from typing import Any

import ml_collections

_ARMS = ('gated', 'relu')
_SLICE = re.compile(r'-?\d*:-?\d*(:-?\d+)?')


def choose(
  c: ml_collections.ConfigDict,
  arg: str,
  members: Sequence[dict[str, Any]],
  *,
  default: str,
) -> ml_collections.ConfigDict:
  """Sets `c.sites` and `c.saes`.

  Args:
    c: a whole config.
    arg: the words.
    members: all there are.
    default: the site that is meant when none is named.

  Raises:
    ValueError: a word is none of the above, or nothing is left.
  """
  everything = tuple(dict.fromkeys(m['site'] for m in members))
  sites, arms, part = set(), set(), slice(None)
  for word in arg.split(',') if arg else ():
    if word in everything:
      sites.add(word)
    elif word == 'all':
      sites.update(everything)
    elif word in _ARMS:
      arms.add(word)
    elif _SLICE.fullmatch(word):
      part = slice(*(int(n) if n else None for n in word.split(':')))
    else:
      raise ValueError(
        f'{word!r} is no choice of this config; there are the sites '
        f'{", ".join(everything)}, all of them as all, the arms '
        f'{" and ".join(_ARMS)}, and slices such as 0:4'
      )
  sites = sites or {default}
  arms = arms or set(_ARMS)
  left = [
    m for m in members if m['site'] in sites and m['architecture'] in arms
  ]
  if not left[part]:
    raise ValueError(
      f'{arg!r} leaves no SAE of this config; the slice is of {len(left)}'
    )
  c.sites = tuple(site for site in everything if site in sites)
  c.saes = tuple(left[part])
  return c
