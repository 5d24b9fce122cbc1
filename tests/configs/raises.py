"""A config file with a mistake: it raises."""


def get_config():
  raise ValueError('no such dataset: pile')
