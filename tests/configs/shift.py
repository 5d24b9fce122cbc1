"""Rescale & shift on the smoke run's baseline, whose folder is the argument."""

from experiments import smoke


def get_config(arg):
  c = smoke.get_config()
  workdir, _, baseline = arg.partition(',')
  c.saes = (
    {
      'name': 'shift',
      'architecture': 'rescale_shift',
      'site': 'mlp_out.0',
      'features': 96,
      'l1': 0.0,
      'baseline': workdir,
      'baseline_member': baseline,
    },
    {
      'name': 'variant',
      'architecture': 'gated',
      'site': 'mlp_out.0',
      'features': 64,
      'l1': 0.1,
      'encoder': 'untied',
      'freeze_aux_decoder': False,
    },
  )
  return c
