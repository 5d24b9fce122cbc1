"""Where the TPU's compiler is, for commands that compile with it."""

import os
import pathlib
import sys

import pytest

_LIBTPU = pathlib.Path(sys.prefix, 'libtpu')  # Where `make test` puts it.


def environment() -> dict[str, str]:
  """Returns variables of a process that finds the compiler; skips without it.

  It is not on the path of the tests themselves: JAX would look for a TPU.
  """
  if not (_LIBTPU / 'libtpu').is_dir():
    pytest.skip(f'no libtpu in {_LIBTPU}; make test installs it')
  path = [str(_LIBTPU), os.environ.get('PYTHONPATH')]
  return {'PYTHONPATH': os.pathsep.join(filter(None, path))}
