"""A small store of planted sparse codes, for training to be quick and real."""

import jax
import pytest

from gsae_jax.training import optimizer, rows
from tests.support.training import scales_in_float64, write_store


@pytest.fixture(scope='session')
def store(tmp_path_factory):
  return write_store(tmp_path_factory.mktemp('store'))


@pytest.fixture
def float64(x64, monkeypatch):
  """States, products and Adam are float64; activations stay float32.

  Two programs that compute the same add up in another order: on another mesh, in
  a stack, by another kernel. In float32 one of a million gates is within that of
  0, open in one program and shut in the other, and moves weights by up to a whole
  step of Adam; which one depends on the processor. In float64 it is one of 1e14.
  """
  for module in optimizer, rows:
    monkeypatch.setattr(module, 'scales', scales_in_float64)
  with jax.numpy_dtype_promotion('standard'):  # Of float32 activations.
    yield
