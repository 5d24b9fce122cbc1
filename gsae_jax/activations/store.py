"""The activation store, and the door through which it is read.

This module never imports jax: a store is data, and looking at it needs no
accelerator.
"""

import dataclasses
import difflib
from typing import Any

import numpy as np
import tensorstore as ts

from gsae_jax.activations import layout, reading
from gsae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Site:
  """One site.

  Attributes:
    width: D.
    mean_D: float64 mean of the activations.
    mean_norm: mean of `||x||` of the activations.
    mean_squared_norm: mean of `||x||^2` of the activations.
    encoding: how they are stored; None is as they are.
  """

  width: int
  mean_D: np.ndarray
  mean_norm: float
  mean_squared_norm: float
  encoding: layout.Encoding | None


@dataclasses.dataclass(frozen=True)
class Store:
  """A finished store.

  Attributes:
    path: where it is.
    identity: everything that determines its content.
    provenance: where that came from: `lm_path`, `lm_revision`, `text_path`.
    content_hash: SHA-256 of the identity and of how values are encoded.
    rows: N.
    shard_rows: rows of a shard.
    chunk_rows: rows of an inner chunk.
    dtype: what activations are stored as.
    sites: statistics by site.
  """

  path: str
  identity: dict[str, Any]
  provenance: dict[str, Any]
  content_hash: str
  rows: int
  shard_rows: int
  chunk_rows: int
  dtype: str
  sites: dict[str, Site]

  def array(
    self, name: str, *, context: ts.Context | None = None
  ) -> ts.TensorStore:
    """Opens `<site>/activations` or one of the row arrays, as stored.

    Checksums are checked when it is read, and fingerprints are not: `read` does.

    Raises:
      UserError: it is not there, or not what the manifest says.
    """
    widths = {site: s.width for site, s in self.sites.items()}
    specs = layout.array_specs(self.path, vars(self) | {'widths': widths})
    return layout.open_array(specs[name], context)

  def read(self, site: str, first: int, last: int) -> np.ndarray:
    """The activations `[last - first, D]` of consecutive rows.

    Raises:
      UserError: they are not what was written.
    """
    reader = reading.Reader(self, (site,), self.chunk_rows)
    return reader.activations(site, first, last)


def differences(have: Any, want: Any, prefix: str = '') -> list[str]:
  """Names, with both values, of the leaves in which two mappings differ."""
  if isinstance(have, dict) and isinstance(want, dict):
    return [
      line
      for key in sorted({*have, *want})
      for line in differences(have.get(key), want.get(key), f'{prefix}{key}.')
    ]
  if have == want:
    return []
  return [f'{prefix.rstrip(".")} is {have!r} there and {want!r} here']


def open_store(path: str) -> Store:
  """Opens a finished store.

  Raises:
    UserError: there is none, it is unfinished or damaged, or its schema is
      unknown.
  """
  manifest = layout.read_manifest(path)
  if manifest is None:
    raise UserError(
      f'--store: no activation store at {path}; run gsae_jax.harvest first'
    )
  if 'sites' not in manifest:
    raise UserError(
      f'--store: the harvest at {path} is unfinished; run the same '
      'gsae_jax.harvest command again, and it will go on'
    )
  encodings = layout.encodings_of(manifest)
  plain = ('identity', 'provenance', 'content_hash', 'rows', 'shard_rows')
  return Store(
    path=path,
    **{name: manifest[name] for name in plain},
    chunk_rows=manifest['chunk_rows'],
    dtype=manifest['dtype'],
    sites={
      name: Site(
        width=manifest['widths'][name],
        mean_D=np.array(s['mean']),
        mean_norm=s['mean_norm'],
        mean_squared_norm=s['mean_squared_norm'],
        encoding=encodings[name],
      )
      for name, s in manifest['sites'].items()
    },
  )


def check_site(store: Store, site: str, member: str) -> None:
  if site not in store.sites:
    near = difflib.get_close_matches(site, store.sites, 1)
    hint = f'; did you mean {near[0]!r}?' if near else ''
    raise UserError(
      f'saes: member {member!r} trains on {site!r}, and the store at '
      f'{store.path} holds {", ".join(store.sites)}{hint}'
    )
