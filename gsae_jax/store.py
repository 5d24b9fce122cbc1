r"""Looks at an activation store, finished or not.

  python -m gsae_jax.store inspect PATH     what it is and what is in it
  python -m gsae_jax.store verify PATH      reads every byte; names bad files
  python -m gsae_jax.store verify PATH --repair    and deletes them, so that the
                                            same harvest writes them again
  python -m gsae_jax.store stats PATH       norms of a sample of rows

PATH is a folder, gs:// or s3://.
"""

import json

import numpy as np
import tqdm
from absl import flags

from gsae_jax import program
from gsae_jax.activations import layout
from gsae_jax.activations import verify as verify_lib
from gsae_jax.activations.reading import Reader
from gsae_jax.activations.store import Store, open_store
from gsae_jax.errors import FAILED, UserError

_BINS = 20


def define_flags(values: flags.FlagValues) -> None:
  """Adds the flags of this command."""
  flags.DEFINE_bool(
    'repair', False, 'verify: delete what is bad.', flag_values=values
  )
  flags.DEFINE_integer(
    'rows',
    65_536,
    'stats: how many rows to look at, evenly spread.',
    lower_bound=1,
    flag_values=values,
  )


def inspect(path: str, given: flags.FlagValues) -> int:
  """Prints a summary."""
  verifier = verify_lib.Verifier(path)
  m = verifier.manifest
  identity, came_from = m['identity'], m['provenance']
  done = len(verifier.there)
  state = 'finished' if 'sites' in m else 'unfinished'
  per_row = layout.row_bytes(m)
  lines = [
    ('schema', m['schema']),
    ('content hash', m['content_hash']),
    ('state', f'{state}, {done} of {verifier.shards} shards'),
    ('rows', f'{m["rows"]:,} in shards of {m["shard_rows"]:,}'),
    ('size', f'{m["rows"] * per_row / 1e9:.3f} GB, {per_row:,} bytes a row'),
    *((k, v) for k, v in came_from.items() if v is not None),
  ]
  for name, value in identity.items():
    if name != 'sites':  # The table below has them.
      lines.append((name, json.dumps(value)))
  for name, value in lines:
    print(f'{name:14}{value}')
  print(
    f'\n{"site":24}{"width":>7}{"dtype":>10}{"centred":>9}{"E||x||^2":>12}'
    f'{"||E x||^2 / E||x||^2":>22}'
  )
  for site, width in m['widths'].items():
    centred = 'no' if m['encodings'][site] is None else 'yes'
    line = f'{site:24}{width:>7}{m["dtype"]:>10}{centred:>9}'
    if 'sites' in m:
      known = m['sites'][site]
      share = np.sum(np.square(known['mean'])) / known['mean_squared_norm']
      line += f'{known["mean_squared_norm"]:>12.5g}{share:>22.3f}'
    print(line)
  return 0


def verify(path: str, given: flags.FlagValues) -> int:
  """Prints the bad files; 1 if there are any and they were left there."""
  verifier = verify_lib.Verifier(path)
  bad = []
  for damage in tqdm.tqdm(
    verifier.damage(), total=len(verifier.there) + 1, unit='shard'
  ):
    bad += damage
  for d in bad:
    whose = 'all shards' if d.shard is None else f'shard {d.shard}'
    print(f'bad: {whose}: {path}/{d.key}: {d.why}')
  print(
    f'{len(verifier.there)} of {verifier.shards} shards read, '
    f'{len(bad)} bad file{"" if len(bad) == 1 else "s"}'
  )
  if 'sites' not in verifier.manifest:
    print('the store is unfinished; the same gsae_jax.harvest goes on')
  if not bad:
    return 0
  foreign = [d for d in bad if 'of the store' in d.why]
  if len(foreign) == len(verifier.there) > 1:
    print('every record is of another store: is this the right manifest.json?')
  if not given.repair:
    print('run verify --repair, and then the same gsae_jax.harvest again')
    return FAILED
  verifier.repair(bad)
  print('deleted; run the same gsae_jax.harvest again to write them')
  return 0


def stats(path: str, given: flags.FlagValues) -> int:
  """Prints a histogram of row norms for every site."""
  store = open_store(path)
  for site in store.sites:
    norms = np.sqrt(squared_norms(store, site, given.rows))
    quantiles = np.quantile(norms, (0.01, 0.25, 0.5, 0.75, 0.99))
    print(
      f'{site}: ||x|| of {len(norms):,} of {store.rows:,} rows; 1, 25, 50, 75, '
      f'99 %: {", ".join(f"{q:.4g}" for q in quantiles)}'
    )
    counts, edges = np.histogram(norms, _BINS)
    for count, edge in zip(counts, edges, strict=False):
      bar = '#' * round(50 * count / counts.max())
      print(f'  from {edge:<10.4g}{count:>8}  {bar}')
  return 0


def squared_norms(store: Store, site: str, rows: int) -> np.ndarray:
  """`||x||^2` of rows in chunks that are evenly spread over a store."""
  reader = Reader(store, (site,), store.chunk_rows)
  chunks = -(-store.rows // store.chunk_rows)
  wanted = min(chunks, -(-rows // store.chunk_rows))
  parts = []
  for chunk in np.linspace(0, chunks - 1, wanted).astype(int).tolist():
    first = chunk * store.chunk_rows
    last = min(first + store.chunk_rows, store.rows)
    x_ND = reader.activations(site, first, last).astype(np.float64)
    parts.append(np.sum(x_ND**2, 1))
  return np.concatenate(parts)


COMMANDS = {'inspect': inspect, 'verify': verify, 'stats': stats}


def main(given: flags.FlagValues, command: str, path: str) -> int:
  if command not in COMMANDS:
    raise UserError(f'{command!r} is not one of {", ".join(COMMANDS)}')
  for name, owner in (('repair', 'verify'), ('rows', 'stats')):
    if given[name].present and command != owner:
      raise UserError(f'--{name} goes with {owner}, not with {command}')
  return COMMANDS[command](path, given)


COMMAND = program.Command(define_flags, main, ('COMMAND', 'PATH'))

if __name__ == '__main__':
  COMMAND.run()
