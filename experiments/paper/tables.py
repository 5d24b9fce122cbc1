"""The paper's own results: the 283 rows of Tables 1 to 8 (arXiv 2404.16014 v2).

tables.csv has them as printed, with the cross-entropies that belong to a site in
every row. The published text merges a few cells: of Gemma-7B's Gated SAEs at
attention layer 20, which of 6e-5 and 4e-5 is which is a guess. Loss recovered
follows from the cross-entropies in all rows, to rounding.
"""

import csv
import pathlib
from typing import Any

from experiments.paper import recipe

_PATH = pathlib.Path(__file__).parent / 'tables.csv'
_SITES = {'Resid': 'resid_post', 'MLP': 'mlp_out', 'Attn': 'attn_pre_linear'}
_ARMS = {'gated': 'gated', 'baseline': 'relu'}

MODELS = ('Gemma-7B', 'Pythia-2.8B')  # GELU-1L's are figures only.


def records(model: str) -> list[dict[str, Any]]:
  """The rows of one model, as evaluation records, so that frontiers compare.

  `l0` is None in four rows, where the paper prints a negative number (a counter
  that overflowed); their neighbours with L0 near 1000 deserve suspicion.

  Args:
    model: one of `MODELS`.
  """
  with _PATH.open(newline='') as f:
    rows = [r for r in csv.DictReader(f) if r['model'] == model]
  out = []
  for r in rows:
    l0 = float(r['l0'])
    out.append(
      {
        'site': f'{_SITES[r["site"]]}.{r["layer"]}',
        'architecture': _ARMS[r['architecture']],
        'variant': '',
        'seed': None,  # Not stated.
        'features': int(r['width']),
        'l1_coefficient': float(r['l1_coefficient']),
        'learning_rate': float(r['learning_rate']),
        'l0': l0 if l0 >= 0 else None,
        'loss_recovered': round(float(r['loss_recovered_percent']) / 100, 4),
        'ce_clean': float(r['clean_ce']),
        'ce_spliced': float(r['sae_ce']),
        'ce_zero_ablation': float(r['zero_ablation_ce']),
        'gamma': float(r['gamma']),
        'alive_fraction': round(float(r['alive_percent']) / 100, 4),
      }
    )
  return out


def members(model: str, family: str) -> tuple[dict[str, Any], ...]:
  """A config's members for the rows of one model, in the units of the tables.

  They stand by site, arm (Gated first), features, coefficient and learning rate.
  Rows that differ in none of these are one member: 273 of 283 remain.

  Args:
    model: one of `MODELS`.
    family: see `recipe.member`.
  """
  named = {}
  for r in records(model):
    name = '{architecture}_{site}_{features}_{l1_coefficient:g}'.format(**r)
    name = f'{name}_{r["learning_rate"]:g}'
    named[name] = recipe.member(
      r['architecture'],
      family,
      name=name,
      site=r['site'],
      features=r['features'],
      l1=r['l1_coefficient'],
      learning_rate=r['learning_rate'],
    )
  kinds, arms = tuple(_SITES.values()), tuple(_ARMS.values())

  def place(m):
    kind, layer = m['site'].split('.')
    return (
      kinds.index(kind),
      int(layer),
      arms.index(m['architecture']),
      m['features'],
      m['l1'],
      m['learning_rate'],
    )

  return tuple(sorted(named.values(), key=place))
