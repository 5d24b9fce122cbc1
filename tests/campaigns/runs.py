"""Runs that are interrupted at a drawn moment, and how two runs are compared."""

import contextlib
import json
import os
import re
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.support.commands import metrics_of


def names(folder):
  """Names in a folder, none where there is no folder."""
  try:
    return set(os.listdir(folder))
  except FileNotFoundError:
    return set()


def await_moment(moment, processes, every=0.0005):
  """Waits until `moment()` holds, asked every so many seconds, as all run."""
  while not moment():
    ended = [p for p in processes if p.poll() is not None]
    assert not ended, [(p.returncode, *p.communicate()) for p in ended]
    time.sleep(every)  # What is waited for may pass within a few of these.


@contextlib.contextmanager
def none_left(processes):
  """Kills, behind the block, whichever of the processes it did not wait for."""
  try:
    yield
  finally:
    for p in processes:
      if not p.stdout.closed:
        p.kill()
        p.communicate()


def after(seconds):
  """A moment so many seconds from now."""
  until = time.monotonic() + seconds
  return lambda: time.monotonic() >= until


def unfinished_shards(store, sites):
  """Shards of which an array has a file, and that have no record."""
  begun = {
    name for site in sites for name in names(store / site / 'activations/c')
  }
  finished = {name.removesuffix('.json') for name in names(store / 'records')}
  return begun - finished


def finished_checkpoint(workdir):
  """The step of the latest finished checkpoint; -1 where there is none."""
  steps = [int(n) for n in names(workdir / 'checkpoints') if n.isdigit()]
  return max(steps, default=-1)


def is_saving(workdir):
  """Whether a checkpoint is being written."""
  return any('tmp' in name for name in names(workdir / 'checkpoints'))


def logged_step(workdir):
  """The last step in metrics.jsonl; -1 where there is none."""
  path = workdir / 'metrics.jsonl'
  if not path.exists():
    return -1
  steps = re.findall(rb'^{"step": (\d+)', path.read_bytes(), re.M)
  return int(steps[-1]) if steps else -1


def checkpoint_arrays(workdir):
  """The latest checkpoint's step and all of its arrays, by path."""
  step = finished_checkpoint(workdir)
  folder = workdir / 'checkpoints' / str(step) / 'state'
  with ocp.PyTreeCheckpointer() as checkpointer:
    tree = checkpointer.metadata(folder).item_metadata.tree
    as_numpy = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
    )
    found = checkpointer.restore(folder, restore_args=as_numpy)
  leaves = jax.tree_util.tree_flatten_with_path(found)[0]
  return step, {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def assert_equal_training(ours, theirs):
  """Two workdirs hold the same metrics, steps and bits of all arrays."""
  assert metrics_of(ours) == metrics_of(theirs)
  # A process that is told to stop saves its step, and one that is killed before
  # older checkpoints are deleted leaves one more.
  assert names(ours / 'checkpoints') >= names(theirs / 'checkpoints')
  (step, here), (wanted, there) = map(checkpoint_arrays, (ours, theirs))
  assert step == wanted and here.keys() == there.keys()
  for name, value in there.items():
    np.testing.assert_array_equal(here[name], value, err_msg=name)


def assert_equal_evaluations(ours, theirs):
  """Two workdirs hold the same files of evaluations, to the bit."""
  wanted = {p.name: p for p in (theirs / 'eval').iterdir() if p.is_file()}
  assert {p.name for p in (ours / 'eval').iterdir() if p.is_file()} == set(
    wanted
  )
  for name, path in wanted.items():
    ours_, theirs_ = (ours / 'eval' / name).read_bytes(), path.read_bytes()
    if name.endswith('.json'):
      assert json.loads(ours_) == json.loads(theirs_)
    assert ours_ == theirs_, name
