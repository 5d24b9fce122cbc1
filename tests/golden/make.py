"""Writes families.json and families.safetensors; see tests/support/golden.py.

python -m tests.golden.make        (needs torch)
"""

import json

from safetensors.numpy import save_file

from tests.support import families
from tests.support.golden import FOLDER


def main():
  cases, arrays = {}, {}
  for name in families.CASES:
    model = families.make(name)
    logits, taken = families.run(model, families.random_ids(batch=1))
    arrays[f'{name}/logits'] = logits
    site = f'resid_post.{families.LAYERS - 1}'
    arrays[f'{name}/{site}'] = taken[site]
    rounded, _ = families.run(model.bfloat16(), families.random_ids(batch=1))
    arrays[f'{name}/bfloat16'] = rounded
    cases[name] = {
      'config': model.config.to_dict(),
      'shapes': {k: list(p.shape) for k, p in model.named_parameters()},
    }
  with open(FOLDER / 'families.json', 'w') as f:
    json.dump(cases, f, indent=1)
    f.write('\n')
  save_file(arrays, FOLDER / 'families.safetensors')


if __name__ == '__main__':
  main()
