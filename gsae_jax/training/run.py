"""The members of a run: their arrays, what is saved of them, who was stopped."""

import dataclasses
from typing import Any

import jax

from gsae_jax.activations.store import Store
from gsae_jax.errors import UserError
from gsae_jax.training import state as state_lib
from gsae_jax.training.checkpoints import Checkpoints
from gsae_jax.training.groups import Baseline, Group
from gsae_jax.training.members import Member


class Run:
  """All members, in groups.

  Attributes:
    groups: of the members.
    stopped: by name, `step`, `reason` and `last_checkpoint`. They take no part
      any more, and later checkpoints are without them.
  """

  def __init__(self, groups: list[Group], store: Store):
    self.groups = groups
    self.members = {m.name: (m, g) for g in groups for m in g.members}
    self.stopped: dict[str, dict[str, Any]] = {}
    self._store = store

  def alive(self) -> list[str]:
    return [name for name in self.members if name not in self.stopped]

  def step(self, batch: dict[str, jax.Array]) -> dict[tuple[str, ...], dict]:
    """Trains; returns metrics by the names of each group."""
    return {
      g.names: g.step(batch)
      for g in self.groups
      if set(g.names) - self.stopped.keys()
    }

  def start(self, baseline: Baseline | None) -> None:
    """Gives every member its first state."""
    for group in self.groups:
      group.put({m.name: group.fresh(m, baseline) for m in group.members})

  def checkpoint(self) -> dict[str, Any]:
    """What is saved."""
    saved: dict[str, Any] = {}
    for group in self.groups:
      if set(group.names) - self.stopped.keys():
        saved |= group.to_checkpoint()
    return {'members': {name: saved[name] for name in self.alive()}}

  def restore(self, saved: Checkpoints, step: int) -> None:
    """Takes the states of a checkpoint.

    Raises:
      UserError: it is of members of other shapes.
    """
    metadata = saved.metadata(step)
    self.stopped = metadata['stopped']
    there = {m['name']: m for m in metadata['members']}
    for name in self.alive():
      member, _ = self.members[name]
      if name not in there or there[name]['shapes'] != shapes(member):
        raise UserError(
          f'saes: the checkpoint has no member {name!r} of this architecture '
          'and size; start it in another --workdir'
        )
    wanted = {n: self.members[n][1].saved_shapes() for n in self.alive()}
    found = saved.restore(step, {'members': wanted})['members']
    states = {}
    for name in self.alive():
      member, group = self.members[name]
      state = group.from_checkpoint(found[name])
      scale = member.hyper.scale
      if float(scale) != there[name]['scale']:  # Another store, or normalize.
        raw = found[name]['params']
        raw = state_lib.turn(state_lib.fold_scale(raw, 1 / scale))
        state = state._replace(params=raw)
      # Another seed by permission draws what resampling draws from here on.
      key = state_lib.key_data(member.seed)
      rng = jax.device_put(key, state.rng.sharding)
      states[name] = state._replace(rng=rng)
    for group in self.groups:
      for m in group.members:
        if m.name in self.stopped:  # Its place in a stack is filled.
          states[m.name] = group.from_checkpoint(
            state_lib.zeros(group.saved_shapes())
          )
      group.put(states)

  def describe(self) -> list[dict[str, Any]]:
    """What a reader needs to know of each saved member, as plain data."""
    found = []
    for name in self.alive():
      m, _ = self.members[name]
      site = self._store.sites[m.config.site]
      found.append(
        dataclasses.asdict(m.config)
        | {
          'seed': m.seed,
          'learning_rate': float(m.hyper.learning_rate),
          'loss_scale': m.loss_scale,
          'width': site.width,
          'scale': float(m.hyper.scale),
          'error_scale': float(m.hyper.error_scale),
          'mean_squared_norm': site.mean_squared_norm,
          'shapes': shapes(m),
        }
      )
    return found


def shapes(member: Member) -> dict[str, list[int]]:
  """Shape of each parameter."""
  params = state_lib.checkpoint_shapes(member.module)['params']
  return {k: list(v.shape) for k, v in params.items()}
