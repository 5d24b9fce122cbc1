"""A config that lacks a section."""

import ml_collections

from experiments import smoke


def get_config() -> ml_collections.ConfigDict:
  c = smoke.get_config()
  del c['loader']
  return c
