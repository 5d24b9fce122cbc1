"""Draws half of the mutations from a tool's list, by a hash.

  VENV/bin/python tests/mutations/draw.py            prints what is drawn
  VENV/bin/python tests/mutations/draw.py --write    writes it to cases/

VENV is an environment with `cosmic-ray==8.7.0`, which the project itself does not
need. Candidates are all mutations that cosmic-ray's operators make in the files of
a package, without the kinds that `_is_wanted` leaves out. They are sorted by the
SHA-256 of `file:line:operator:number`, where `number` counts the mutations of one
operator on one line. Of each package the first few are taken, and of each file one
at most. `skipped.toml` lists what was drawn and left out, with the reason: no test
can see it, or it only changes the text of a message.

When lines move, other candidates come first. Cases that were drawn before stay; in
each, `drawn` names the operator, the line at that time, and the hash. A case that
is written here has no `why`, and its snippet is a whole line: shorten it by hand.
"""

import argparse
import ast
import hashlib
import pathlib
import re
import tomllib

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.number_replacer import NumberReplacer
from cosmic_ray.plugins import get_operator, operator_names

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
HERE = pathlib.Path(__file__).resolve().parent

# How many are drawn of each package: its files, and those that are left out.
QUOTAS = {
  'lm': (5, 'gsae_jax/lm/*.py'),
  'families': (2, 'gsae_jax/lm/families/*.py'),
  'activations': (5, 'gsae_jax/activations/*.py'),
  'sae': (4, 'gsae_jax/sae/*.py'),
  'training': (7, 'gsae_jax/training/*.py'),
  'evaluation': (5, 'gsae_jax/evaluation/*.py'),
  'modules': (3, 'gsae_jax/*.py'),
  'programs': (2, 'gsae_jax/*.py'),
  'launch': (4, 'launch/*.py'),
  'preflight': (2, 'launch/preflight/*.py'),
  'paper': (1, 'experiments/paper/*.py'),
}
PROGRAMS = {'harvest', 'train', 'evaluate', 'report', 'store', 'convert'}

# Operators between numbers that a slip of the hand could exchange.
_ARITHMETIC = {'Add', 'Sub', 'Mul', 'Div', 'FloorDiv', 'Mod', 'Pow'}
# Of masks. `|` itself joins dictionaries here.
_BITS = {'BitAnd', 'BitXor'}


def _is_wanted(operator: str, line: str) -> bool:
  """Whether a kind of mutation may be drawn.

  Left out are operators that stop a program at once whatever it is tested with
  (bit operations on floats and dictionaries, an exception that does not exist,
  orders of None), decorators, signatures and annotations, flags, and `[None]` in
  an index.
  """
  name = operator.removeprefix('core/')
  if name in ('ExceptionReplacer', 'RemoveDecorator'):
    return False
  kind, _, change = name.partition('Operator_')
  if kind == 'ReplaceBinary':
    before, after = change.split('_')
    if not {before, after} <= _ARITHMETIC and before not in _BITS:
      return False
    if before in _BITS and after not in _BITS | {'BitOr'}:
      return False
  if kind == 'ReplaceComparison' and ('Is' in change):
    if change not in ('Is_IsNot', 'IsNot_Is'):
      return False
  if kind == 'ReplaceUnary' and not change.startswith('Delete'):
    return False
  if re.match(r'\s*(async )?def |\s*@|.*DEFINE_', line) or '->' in line:
    return False
  return not re.search(r'\[([:.]+, )*None|None\]', line)


def candidates(path: pathlib.Path):
  """Yields operator, line, number on the line, source, and how to mutate it."""
  source = path.read_text()
  lines = source.splitlines()
  signatures = _signature_lines(source)
  nodes = list(ast_nodes(get_ast(source)))
  for name in sorted(operator_names()):
    if get_operator(name).arguments():
      continue
    operator = get_operator(name)()
    starts = [
      start for node in nodes for start, _ in operator.mutation_positions(node)
    ]
    seen: dict[int, int] = {}
    for occurrence, (line, column) in enumerate(starts):
      number = seen[line] = seen.get(line, -1) + 1
      if line in signatures or not _is_wanted(name, lines[line - 1]):
        continue

      def make(operator=operator, occurrence=occurrence, at=(line, column)):
        mutated = mutate_code(source, operator, occurrence).splitlines()
        line, column = at
        changed = mutated[line - 1]
        # A space stands where the mutation put one, or left one too many.
        before = lines[line - 1][column - 1]
        if isinstance(operator, NumberReplacer) and before != ' ':
          changed = changed[:column] + changed[column + 1 :]
        if changed[column : column + 1] == ' ' and before == ' ':
          changed = changed[:column] + changed[column + 1 :]
        mutated[line - 1] = changed
        return '\n'.join(mutated) + '\n'

      yield name, line, number, source, make


def _signature_lines(source: str) -> set[int]:
  """Lines of signatures, and of annotated fields."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      found |= set(range(node.lineno, node.body[0].lineno))
    if isinstance(node, ast.AnnAssign):
      found |= set(range(node.lineno, node.annotation.end_lineno + 1))
  return found


def key(file: str, line: int, operator: str, number: int) -> str:
  text = f'{file}:{line}:{operator.removeprefix("core/")}:{number}'
  return hashlib.sha256(text.encode()).hexdigest()


def snippet(source: str, mutated: str) -> tuple[str, str]:
  """The line that differs, with as many before it as make it unique."""
  a, b = source.splitlines(), mutated.splitlines()
  (i,) = [n for n, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
  first = i
  while source.count('\n'.join(a[first : i + 1]).strip()) != 1:
    first -= 1
  join = lambda last: '\n'.join([*a[first:i], last]).strip()
  return join(a[i]), join(b[i])


def files_of(package: str) -> list[pathlib.Path]:
  _, pattern = QUOTAS[package]
  paths = sorted(ROOT.glob(pattern))
  if package in ('modules', 'programs'):
    wanted = package == 'programs'
    paths = [p for p in paths if (p.stem in PROGRAMS) == wanted]
  return paths


def drawn(package: str, skipped: set[str]):
  """The first few of a package's candidates."""
  found = []
  for path in files_of(package):
    file = str(path.relative_to(ROOT))
    for operator, line, number, source, make in candidates(path):
      k = key(file, line, operator, number)
      found.append((k, file, line, operator, source, make))
  found.sort(key=lambda c: c[0])
  left, files = QUOTAS[package][0], set()
  for k, file, line, operator, source, make in found:
    if not left:
      return
    mutated = make()
    if file in files or k[:12] in skipped or not _compiles(mutated):
      continue
    yield k[:12], file, line, operator, *snippet(source, mutated)
    files.add(file)
    left -= 1


def _compiles(source: str) -> bool:
  try:
    compile(source, '', 'exec')
  except (SyntaxError, SyntaxWarning):
    return False
  return True


def literal(text: str) -> str:
  """As TOML: a literal string, of several lines where it has them."""
  quote = "'''" if "'" in text or '\n' in text else "'"
  return f'{quote}{text}{quote}'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--write', action='store_true')
  given = parser.parse_args()
  raw = tomllib.loads((HERE / 'skipped.toml').read_text())
  skipped = {entry['id'] for entry in raw.get('skipped', ())}
  for package in QUOTAS:
    for k, file, line, operator, old, new in drawn(package, skipped):
      text = (
        f"file = '{file}'\nsnippet = {literal(old)}\n"
        f"replacement = {literal(new)}\norigin = 'drawn'\nwhy = ''\n"
        f"drawn = '{operator.removeprefix('core/')} of line {line}, {k}'\n"
      )
      print(f'# {package}\n{text}')
      if given.write:
        (HERE / 'cases' / f'drawn_{k}.toml').write_text(text)


if __name__ == '__main__':
  main()
