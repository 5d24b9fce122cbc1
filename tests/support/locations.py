"""Folders that tests use."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
SHARED = ROOT.parent / 'shared' / 'data'
