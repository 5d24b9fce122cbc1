"""What the TPU's compiler says of a chip's memory, and the table in the docs."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

LIBTPU = ROOT / '.venv' / 'libtpu'  # Where `make test` puts it.
LIMIT = 16e9 / 2**30  # GiB of a v5e.


def rows(text):
  """Peak in GiB and what is sent, by model, layout and program."""
  found = {}
  for line in text.splitlines():
    cells = [c.strip() for c in line.strip('|').split('|')]
    if len(cells) == 8 and cells[6].startswith('**'):
      counts = dict(re.findall(r'(\d+) (all-reduce|all-gather)', cells[7]))
      found[tuple(cells[:3])] = float(cells[6].strip('*')), counts
  return found


DOCS = rows((ROOT / 'docs' / 'models.md').read_text())


def test_the_table_says_that_everything_fits():
  names = {(name.split(',')[0], program) for name, _, program in DOCS}
  programs = ('harvest', 'spliced', 'comparison')
  assert names == {
    (model, program)
    for model in ('Gemma-7B', 'Pythia-2.8B')
    for program in programs
  }
  assert all(peak < LIMIT for peak, _ in DOCS.values())


@pytest.mark.slow
@pytest.mark.parametrize('only', ['tensor harvest', 'Gemma-7B tensor spliced'])
def test_the_compiler_still_says_so(only):
  if not (LIBTPU / 'libtpu').is_dir():
    pytest.skip(f'no libtpu in {LIBTPU}; make test installs it')
  env = os.environ | {'PYTHONPATH': f'{LIBTPU}:{ROOT}'}
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.tpu_memory', f'--only={only}'],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=env,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = rows(done.stdout)
  assert len(found) == (2 if only == 'tensor harvest' else 1)
  for key, (peak, counts) in found.items():
    documented, sent = DOCS[key]
    assert peak < 1.1 * documented and peak < LIMIT, key
    # Nothing is gathered that was not, and no sum is made twice.
    assert counts == sent, key
