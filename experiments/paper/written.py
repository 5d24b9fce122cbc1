r"""A config that a study wrote down: `--config=experiments/paper/written.py:FILE`.

Every run of `experiments/paper` writes its whole config as JSON beside its
results, and starts the ordinary commands on it, so that each can be started again
by hand:

  python -m gsae_jax.train --config=experiments/paper/written.py:DIR/arms/config.json \
      --store=DIR/store --workdir=DIR/arms
"""

import json
from typing import Any

import ml_collections
from etils import epath
from ml_collections import config_dict

from gsae_jax.parsing import plain


def get_config(path: str) -> ml_collections.ConfigDict:
  try:
    written = json.loads(epath.Path(path).read_text())
  except (OSError, ValueError) as e:
    raise ValueError(f'{path} is not a written config ({e})') from e
  return _config(written)


def text(c: ml_collections.ConfigDict) -> str:
  """What `get_config` reads; references are resolved."""
  return json.dumps(plain(c.to_dict()), indent=1) + '\n'


def _config(group: dict[str, Any]) -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  for name, value in group.items():
    if isinstance(value, dict):
      c[name] = _config(value)
    elif isinstance(value, list):
      c[name] = tuple(value)
    elif value is None:  # So that a command line can set it.
      c[name] = config_dict.placeholder(object)
    else:
      c[name] = value
  return c
