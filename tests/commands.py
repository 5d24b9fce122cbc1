"""Runs the commands in processes of their own."""

import json
import os
import subprocess
import sys
import time

from tests.conftest import ROOT

SMOKE = 'experiments/smoke.py'


def start(program, *flags, config=SMOKE, devices=1, package='gsae_jax', **env):
  command = [sys.executable, '-m', f'{package}.{program}']
  if config and program not in ('report', 'store'):
    command.append(f'--config={config}')
  command += flags
  env = os.environ | env | {'JAX_PLATFORMS': 'cpu', 'NPROC': '16'}
  if devices > 1:
    env['JAX_NUM_CPU_DEVICES'] = str(devices)
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=env,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def run(program, *flags, code=0, timeout=300, **kwargs):
  """Runs a command to its end; returns what it printed."""
  process = start(program, *flags, **kwargs)
  out, err = process.communicate(timeout=timeout)
  assert process.returncode == code, err
  return out


def refuse(program, *flags, match, **kwargs):
  """The command exits with 1, and one line with `match`, not a traceback."""
  process = start(program, *flags, **kwargs)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 1, err
  assert 'Traceback' not in err, err
  lines = [line for line in err.splitlines() if line.startswith('error: ')]
  assert len(lines) == 1 and match in lines[0], err


def wait_for(condition, process):
  while not condition():
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)


def metrics(text):
  """What metrics.jsonl says of members; the rest are times and memory."""
  records = [json.loads(line) for line in text.splitlines()]
  return [r for r in records if r['member']]


def metrics_of(workdir):
  return metrics((workdir / 'metrics.jsonl').read_text())


def files(folder):
  """Contents by name, without the leftovers of killed writers."""
  return {
    str(p.relative_to(folder)): p.read_bytes()
    for p in sorted(folder.rglob('*'))
    if p.is_file() and not p.name.endswith('.__lock')
  }
