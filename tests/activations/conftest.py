"""A store of a thousand rows whose every value is known."""

import pytest

from tests.support.activations import fill


@pytest.fixture(scope='session')
def whole(tmp_path_factory):
  """A finished store that nobody may touch."""
  path = tmp_path_factory.mktemp('whole')
  fill(path)
  return path
