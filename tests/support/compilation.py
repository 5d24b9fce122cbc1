"""Where compiled programs are kept between test runs."""

import hashlib
import importlib.metadata
import os
import pathlib
import platform


def cache_folder() -> pathlib.Path:
  """Returns the cache of this machine's processor and these packages.

  It is below GSAE_TEST_CACHE, `~/.cache/gsae_jax/tests` by default, and may be
  deleted at any time: programs are then compiled again, to the same code.
  """
  root = os.environ.get('GSAE_TEST_CACHE') or '~/.cache/gsae_jax/tests'
  about = [platform.python_version(), os.environ.get('XLA_FLAGS', '')]
  about += [importlib.metadata.version(name) for name in ('jax', 'jaxlib')]
  # XLA compiles for the instructions that the processor has, and checks them
  # only roughly when it loads a program that another one compiled.
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  about.append(platform.processor() or platform.machine())
  if cpuinfo.exists():
    lines = cpuinfo.read_text().splitlines()
    about += sorted({x for x in lines if x.startswith(('flags', 'model name'))})
  key = hashlib.sha256('\n'.join(about).encode()).hexdigest()[:16]
  return pathlib.Path(root).expanduser() / key
