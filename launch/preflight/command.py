r"""What an experiment would take of a TPU slice, before there is one.

  python -m launch preflight --config=experiments/gemma_7b.py --topology=v5e:4x4

Compiles harvest's pass, the train step and the evaluator's passes with the TPU's
own compiler (the extra `tpu`, or a folder with libtpu on PYTHONPATH), and says
what a chip computes, moves, sends and holds, what bounds it, and how long the
config takes. Exits with 1 and one line where it does not fit. docs/preflight.md
says how to read it.
"""

import jax
from absl import flags

from gsae_jax import config as config_lib
from gsae_jax import program
from gsae_jax.errors import UserError
from launch.preflight import parts, topology
from launch.preflight.examine import examine
from launch.preflight.model import read_model
from launch.preflight.roofline import GIB


def define_flags(values: flags.FlagValues) -> None:
  """Adds the flags of this command."""
  program.define_config(values)
  flags.DEFINE_string(
    'topology',
    None,
    "Chips, as in 'v5e:4x4' or 'v5p:2x2x2'.",
    flag_values=values,
  )
  flags.DEFINE_list(
    'parts',
    list(parts.PARTS),
    'Which programs to look at.',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'tries',
    1,
    "Meshes that the train step is compiled for in addition to the config's.",
    lower_bound=0,
    flag_values=values,
  )
  flags.DEFINE_float(
    'dollars_per_chip_hour',
    None,
    'What you pay; without it, no costs.',
    flag_values=values,
  )
  flags.mark_flags_as_required(['config', 'topology'], values)


def main(given: flags.FlagValues) -> int:
  # A libtpu that is installed looks for a TPU otherwise.
  jax.config.update('jax_platforms', 'cpu')
  config = config_lib.parse(program.read_config(given))
  machine = topology.machine(given.topology)
  for part in given.parts or ['']:
    if part not in parts.PARTS:
      raise UserError(
        f'--parts: {part!r} is not one of {", ".join(parts.PARTS)}'
      )
  topology.devices(machine)  # Before the language model is asked for.
  model = read_model(config.lm)
  print(
    f'{machine.name}: {machine.chips} chip(s) of '
    f'{machine.chip.usable / GIB:.2f} GiB on {machine.hosts} host(s)'
  )
  found = examine(
    config,
    model,
    machine,
    wanted=given.parts,
    tries=given.tries,
    price=given.dollars_per_chip_hour,
    say=lambda text: print(text, flush=True),
  )
  if found.problems:
    raise UserError('. '.join(found.problems))
  return 0


COMMAND = program.Command(define_flags, main)

if __name__ == '__main__':
  COMMAND.run()
