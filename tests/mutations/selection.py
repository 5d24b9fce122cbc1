"""Which test files are run for a mutated file, and in which order."""

import ast
import pathlib


def stages(root: pathlib.Path, file: str) -> dict[str, list[str]]:
  """Returns test files by stage: each stage is run where those before pass.

  Args:
    root: of the tree.
    file: the mutated file.

  Returns:
    `nearest`, the test file of the same name, or else those that import the
    module; `folder`, the rest of the test folder that mirrors the package; and
    `tree`, all other test files. Stages may be empty.
  """
  everything = sorted((root / 'tests').rglob('test_*.py'))
  folder = [p for p in everything if is_mirrored(p.relative_to(root), file)]
  stem = pathlib.PurePath(file).stem
  nearest = [p for p in folder if p.stem == f'test_{stem}']
  nearest = nearest or [p for p in folder if stem in imported(p.read_text())]
  parts = {
    'nearest': nearest,
    'folder': [p for p in folder if p not in nearest],
    'tree': [p for p in everything if p not in folder],
  }
  return {
    stage: [str(p.relative_to(root)) for p in paths]
    for stage, paths in parts.items()
  }


def is_mirrored(test: pathlib.PurePath, file: str) -> bool:
  """Whether a test file is in the folder that mirrors a file's package.

  Modules of `gsae_jax` itself have `tests/*.py`, and those of the paper's
  experiments `tests/test_paper_*.py`.
  """
  top, *rest = pathlib.PurePath(file).parts
  if top == 'launch':
    return test.parts[:2] == ('tests', 'launch')
  if top == 'experiments':
    return len(test.parts) == 2 and test.name.startswith('test_paper')
  if len(rest) > 1:
    return test.parts[:2] == ('tests', rest[0])
  return len(test.parts) == 2


def imported(source: str) -> set[str]:
  """Last names of all modules, and names in them, that a file imports."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name.rpartition('.')[2] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {alias.name for alias in node.names}
      names.add((node.module or '').rpartition('.')[2])
  return names
