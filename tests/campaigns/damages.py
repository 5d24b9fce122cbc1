"""Ways to damage files, each of them drawn."""

import pathlib

import numpy as np


def flip(rng, file: pathlib.Path) -> None:
  """Changes one byte."""
  raw = bytearray(file.read_bytes())
  raw[rng.integers(len(raw))] ^= int(rng.integers(1, 256))
  file.write_bytes(raw)


def truncate(rng, file: pathlib.Path) -> None:
  """Cuts the file at a drawn byte."""
  raw = file.read_bytes()
  file.write_bytes(raw[: rng.integers(len(raw))])


def extend(rng, file: pathlib.Path) -> None:
  """Appends up to 40 drawn bytes."""
  more = rng.bytes(int(rng.integers(1, 40)))
  file.write_bytes(file.read_bytes() + more)


def delete(rng, file: pathlib.Path) -> None:
  """Deletes the file."""
  del rng
  file.unlink()


def zero(rng, file: pathlib.Path) -> None:
  """Fills a drawn block with zeros, as a write that was lost does."""
  raw = bytearray(file.read_bytes())
  start = int(rng.integers(len(raw)))
  stop = min(len(raw), start + int(rng.integers(1, 512)))
  raw[start:stop] = bytes(stop - start)
  file.write_bytes(raw)


def swap_blocks(rng, file: pathlib.Path, block: int) -> None:
  """Exchanges two blocks of the file, of so many bytes and multiples of it on."""
  raw = file.read_bytes()
  blocks = [raw[i : i + block] for i in range(0, len(raw) - block + 1, block)]
  rest = raw[len(blocks) * block :]
  if len(blocks) > 1:
    a, b = rng.choice(len(blocks), 2, replace=False)
    blocks[a], blocks[b] = blocks[b], blocks[a]
  file.write_bytes(b''.join(blocks) + rest)


def swap_files(a: pathlib.Path, b: pathlib.Path) -> None:
  """Exchanges the contents of two files."""
  first, second = a.read_bytes(), b.read_bytes()
  a.write_bytes(second)
  b.write_bytes(first)


OF_ONE_FILE = (flip, truncate, extend, delete, zero)


def pick(rng: np.random.Generator, choices):
  """One of the choices, of any kind; all are as likely."""
  return choices[rng.integers(len(choices))]
