"""A config file with a mistake: it gives a dictionary."""


def get_config():
  return {'seed': 0}
