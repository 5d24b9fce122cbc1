"""Prints the libtpu that the installed JAX wants, as pip takes it."""

import importlib.metadata
import re

if __name__ == '__main__':
  wanted = importlib.metadata.requires('jax')
  print(re.match(r'libtpu[^;\s]*', next(r for r in wanted if 'libtpu' in r))[0])
