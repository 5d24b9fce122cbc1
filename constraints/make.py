"""Writes the constraints files: the exact versions that each stack installs.

  make constraints

Every version is the newest that pyproject.toml, the stack's own pins (NAME.in,
where there is one) and the package index allow together. Versions are chosen for Linux
on x86_64; installs on other systems take the same ones.
"""

import argparse
import dataclasses
import pathlib
import re
import subprocess
import sys

FOLDER = pathlib.Path(__file__).parent
# PyTorch for NVIDIA GPUs asks for these; the CPU build that tests use does not.
GPU_ONLY = re.compile(r'(nvidia|cuda)-|triton==')


@dataclasses.dataclass(frozen=True)
class Stack:
  """One constraints file.

  Attributes:
    name: of the file, without its suffix.
    pythons: versions of Python that install with the file, the oldest first.
    extras: of the package, that the file covers.
    bare: packages that are installed without their dependencies.
  """

  name: str
  pythons: tuple[str, ...]
  extras: tuple[str, ...] = ('test', 'torch')
  bare: tuple[str, ...] = ()


STACKS = (
  Stack('py311', ('3.11',)),
  Stack('newest', ('3.12', '3.13', '3.14')),
  Stack('colab', ('3.13',)),
  Stack('bench', ('3.11',), ('bench',), ('dictionary-learning',)),
)


def resolve(python: str, requirements: list[str], *options: str) -> list[str]:
  """Returns 'name==version' of all that requirements ask for, on one Python."""
  command = ['uv', 'pip', 'compile', '--quiet', '--no-header', '--no-annotate']
  command += [f'--python-version={python}', *options]
  command += ['--python-platform=x86_64-manylinux_2_28', '-']
  found = subprocess.run(
    command, input='\n'.join(requirements), stdout=subprocess.PIPE, text=True
  )
  if found.returncode:
    sys.exit(f'error: no versions fit together on Python {python}')
  return found.stdout.split()


def main(requirements: list[str]):
  for stack in STACKS:
    path = FOLDER / f'{stack.name}.txt'
    pins = path.with_suffix('.in')
    wanted = requirements + (
      pins.read_text().splitlines() if pins.exists() else []
    )
    package = [str(FOLDER.parent / 'pyproject.toml')]
    package += [f'--extra={extra}' for extra in stack.extras]
    lines = resolve(stack.pythons[0], wanted, *package)
    lines += resolve(stack.pythons[0], list(stack.bare), '--no-deps')
    lines = sorted(line for line in lines if not GPU_ONLY.match(line))
    path.write_text('\n'.join(lines) + '\n')
    # A release without a wheel for a later Python would not install there.
    fixed = [f'--constraint={path}', '--only-binary=:all:']
    for python in stack.pythons[1:]:
      resolve(python, wanted, *package, *fixed)
    print(f'constraints/{path.name}: {len(lines)} packages')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    'requirements', nargs='*', help='more that every stack installs'
  )
  main(parser.parse_args().requirements)
