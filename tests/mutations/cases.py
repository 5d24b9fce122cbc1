"""The mutations: small files, each with a snippet and its replacement."""

import dataclasses
import pathlib
import tomllib

FOLDER = pathlib.Path(__file__).with_name('cases')

# Packages by the start of their files' paths, those with the fastest tests first.
PACKAGES = {
  'experiments/paper': 'paper',
  'gsae_jax/sae': 'sae',
  'gsae_jax/lm': 'lm',
  'launch': 'launch',
  'gsae_jax/evaluation': 'evaluation',
  'gsae_jax/activations': 'activations',
  'gsae_jax/training': 'training',
  'gsae_jax': 'modules and programs',
}


@dataclasses.dataclass(frozen=True)
class Mutation:
  """One small change of the code that a test must notice.

  Attributes:
    name: the stem of its file.
    file: path of the mutated file, from the root of the repository.
    snippet: text that occurs in that file exactly once.
    replacement: what takes the snippet's place.
    origin: 'hand', or 'drawn' from a tool's list (`draw.py`).
    why: what a user would see.
    drawn: the tool's operator, the line, and the hash that was drawn.
  """

  name: str
  file: str
  snippet: str
  replacement: str
  origin: str
  why: str
  drawn: str | None = None

  @property
  def package(self) -> str:
    return next(n for p, n in PACKAGES.items() if self.file.startswith(f'{p}/'))

  def apply(self, source: str) -> str:
    """Returns the mutated source.

    Raises:
      ValueError: the snippet does not occur exactly once.
    """
    count = source.count(self.snippet)
    if count != 1:
      raise ValueError(f'{self.name}: the snippet occurs {count} times')
    return source.replace(self.snippet, self.replacement)


def read_mutations(folder: pathlib.Path = FOLDER) -> list[Mutation]:
  """Returns the mutations by package, in the order of `PACKAGES`, then name."""
  found = [
    Mutation(path.stem, **tomllib.loads(path.read_text()))
    for path in folder.glob('*.toml')
  ]
  order = list(PACKAGES.values())
  return sorted(found, key=lambda m: (order.index(m.package), m.name))
