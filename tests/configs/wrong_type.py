"""A config file with a mistake: a field of the wrong type."""

from experiments import quickstart


def get_config():
  c = quickstart.get_config()
  with c.unlocked():
    del c.train.steps
    c.train.steps = 'a'
  return c
