"""What a run shows while it goes on, and how fast that is."""

import resource
import sys
import time
from typing import Any

import jax
import numpy as np
import tqdm

# ru_maxrss is in kilobytes, on macOS in bytes.
_RSS_UNIT = 1 if sys.platform == 'darwin' else 1024
_LINES = 20  # Of a whole run, where there is no terminal.


class Progress:
  """A bar on terminals, plain lines elsewhere; only on process 0."""

  def __init__(self, *, first: int, steps: int, batch_size: int):
    """Starts the clock.

    Args:
      first: the step that the run starts with.
      steps: it ends with.
      batch_size: tokens of a step.
    """
    self._step = first
    self._first = first
    self._steps = steps
    self._batch_size = batch_size
    self._begun = self._marked = time.monotonic()
    self._marked_step, self._marked_bytes = first, 0
    self._next_line = first
    self._silent = jax.process_index() != 0
    self._bar = tqdm.tqdm(
      total=steps,
      initial=first,
      unit='step',
      mininterval=1.0,
      disable=self._silent or not sys.stderr.isatty(),
    )

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self._bar.close()

  def update(self) -> None:
    """Counts a step."""
    self._step += 1
    self._bar.update()

  def tokens_per_second(self) -> float:
    """Since the start."""
    seconds = time.monotonic() - self._begun
    return (self._step - self._first) * self._batch_size / max(seconds, 1e-9)

  def rates(self, bytes_read: int) -> dict[str, float]:
    """What the time since the last call was used for, and the memory.

    Args:
      bytes_read: from the store by this process, since the start.

    Returns:
      `tokens_per_second`, `read_bytes_per_second`, `host_memory_bytes` (the most
      so far), and `device_memory_bytes` where the device tells.
    """
    now = time.monotonic()
    seconds = max(now - self._marked, 1e-9)
    tokens = (self._step - self._marked_step) * self._batch_size
    read = bytes_read - self._marked_bytes
    self._marked, self._marked_step = now, self._step
    self._marked_bytes = bytes_read
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    values = {
      'tokens_per_second': tokens / seconds,
      'read_bytes_per_second': read / seconds,
      'host_memory_bytes': most,
    }
    device = jax.local_devices()[0].memory_stats()  # None on CPU.
    if device:
      values['device_memory_bytes'] = device['bytes_in_use']
    return values

  def say(self, text: str) -> None:
    """Prints a line of its own."""
    if not self._silent:
      self._bar.write(text, file=sys.stderr)

  def show(self, values: dict[str, dict[str, Any]]) -> None:
    """Tells of the latest values, by member."""
    if not values or self._silent:
      return
    mean = lambda k: np.mean([v[k] for v in values.values()])
    text = (
      f'{self.tokens_per_second():,.0f} tokens/s, mean loss '
      f'{mean("loss"):.4g}, mean L0 {mean("l0"):.1f}'
    )
    if not self._bar.disable:
      self._bar.set_postfix_str(text)
    elif self._step >= self._next_line:
      print(
        f'step {self._step} of {self._steps}: {text}',
        file=sys.stderr,
        flush=True,
      )
      self._next_line = self._step + max(1, self._steps // _LINES)
