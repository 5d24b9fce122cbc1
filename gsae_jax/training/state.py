"""A member's state, how it is born sharded, and how it is written down."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax import sae
from gsae_jax.training.loss import Scalar
from gsae_jax.training.optimizer import Moments, adam

# In training, encoders lie transposed, [F, D]: all of a feature is a row.
TURNED = tuple(k for k, v in sae.SPECS.items() if v == P(None, 'model'))

# Everything that mirrors a parameter is spread as it is. A leaf takes the spec of
# its own name: of what is saved, and of what is trained.
_SAVED_SPECS = sae.SPECS | {
  'steps_since_fired': P('model'),
  'fired_counts': P('model'),
}
SPECS = _SAVED_SPECS | {name: P('model', None) for name in TURNED}

# Parameters in the units of the activations; the others have no unit.
_BIASES = ('b_gate', 'b_mag', 'b_enc', 'b_dec')

OPTIMIZER = adam()


class MemberState(NamedTuple):
  """Everything that one SAE's training carries from step to step.

  Attributes:
    step: int32, steps taken.
    params: the SAE's parameters, for activations times the run's scale, turned.
    opt_state: Adam's second moments and count, of what is trained, turned.
    steps_since_fired: int32 `[F]`, 0 where the feature fired in the last batch.
    fired_counts: int32 `[F]`, rows that it fired on since the last histogram.
    open_share: float32 `[2]`, of the last two batches: see `features.Sums`. 1 at
      first.
    rng: uint32 `[2]`, the member's key; draws are functions of it and the step.
  """

  step: jax.Array
  params: dict[str, jax.Array]
  opt_state: Moments
  steps_since_fired: jax.Array
  fired_counts: jax.Array
  open_share: jax.Array
  rng: jax.Array


Turn = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]


def turn(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Parameters as they lie in training from what they are elsewhere, and back."""
  return {
    k: v.swapaxes(-1, -2) if k in TURNED else v for k, v in params.items()
  }


def shardings(
  mesh: Mesh, tree: Any, *, layout: str = 'alone', saved: bool = False
) -> Any:
  """A NamedSharding for each leaf of a member's state, by its name.

  Args:
    mesh: where.
    tree: arrays, or their shapes.
    layout: 'alone'; 'stacked', with an axis of members in front, over 'sae'; or
      'gathered', a stacked member on its own, whose features are over 'sae' too
      so that taking it out of its group costs no memory.
    saved: the tree is of a checkpoint, not of a `MemberState`.
  """
  specs = _SAVED_SPECS if saved else SPECS

  def named(path, leaf):
    key = path[-1]
    name: str = getattr(key, 'key', '') or getattr(key, 'name', '')
    spec = specs.get(name, P())
    if layout == 'stacked':
      spec = P('sae', *spec)
    if layout == 'gathered' and 'model' in spec:
      axis = spec.index('model')
      if leaf.shape[axis] % (mesh.shape['sae'] * mesh.shape['model']) == 0:
        both = ('sae', 'model')
        spec = P(*(both if part == 'model' else part for part in spec))
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(named, tree)


def key_data(seed: int) -> np.ndarray:
  """The key of a seed, as plain numbers."""
  return np.asarray(jax.random.key_data(jax.random.key(seed)))


def init_member(module: nn.Module, rng: jax.Array) -> MemberState:
  """A fresh state.

  Args:
    module: the architecture, turned.
    rng: see `key_data`.
  """
  key = jax.random.wrap_key_data(rng)
  params = module.init(key, jnp.zeros((1, module.width)))['params']
  trained = {k: v for k, v in params.items() if k not in module.frozen}
  return MemberState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=OPTIMIZER.init(trained),
    steps_since_fired=jnp.zeros(module.features, jnp.int32),
    fired_counts=jnp.zeros(module.features, jnp.int32),
    open_share=jnp.ones(2),
    rng=rng,
  )


def member_shapes(module: nn.Module) -> MemberState:
  """Shapes and dtypes of a member's state."""
  return jax.eval_shape(functools.partial(init_member, module), key_data(0))


def fold_scale(
  params: dict[str, jax.Array], scale: Scalar
) -> dict[str, jax.Array]:
  """Parameters for raw activations, from those trained on `scale * x`.

  Encoders and decoder have no unit, so only the biases change: decoder rows
  stay as they are and features come out in the units of the raw activations.
  """
  return {k: v / scale if k in _BIASES else v for k, v in params.items()}


def to_checkpoint(
  state: MemberState, scale: Scalar, turn: Turn = turn
) -> dict[str, Any]:
  """The state as plain dictionaries, `params` for raw activations.

  The biases are kept in both units, because dividing and multiplying again
  would not give the same bits to a resumed run.
  """
  return {
    'params': turn(fold_scale(state.params, scale)),
    'scaled_biases': {k: v for k, v in state.params.items() if k in _BIASES},
    'opt_state': {
      'count': state.opt_state.count,
      'nu': turn(state.opt_state.nu),
    },
    'steps_since_fired': state.steps_since_fired,
    'fired_counts': state.fired_counts,
    'open_share': state.open_share,
    'rng': state.rng,
    'step': state.step,
  }


def from_checkpoint(saved: dict[str, Any], turn: Turn = turn) -> MemberState:
  """The inverse of `to_checkpoint`, to the bit."""
  opt_state = saved['opt_state']
  return MemberState(
    step=saved['step'],
    params=turn(saved['params']) | saved['scaled_biases'],
    opt_state=Moments(opt_state['count'], turn(opt_state['nu'])),
    steps_since_fired=saved['steps_since_fired'],
    fired_counts=saved['fired_counts'],
    open_share=saved['open_share'],
    rng=saved['rng'],
  )


def checkpoint_shapes(module: nn.Module) -> dict[str, Any]:
  """Shapes and dtypes of what `to_checkpoint` gives."""
  return jax.eval_shape(to_checkpoint, member_shapes(module), 1.0)


def zeros(placed: dict[str, Any]) -> dict[str, Any]:
  """What a checkpoint without content gives, from shapes with shardings."""
  make = jax.jit(
    lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), placed),
    out_shardings=jax.tree.map(lambda a: a.sharding, placed),
  )
  return make()


def place(shapes: Any, shardings: Any) -> Any:
  """Both as one tree of `jax.ShapeDtypeStruct`."""
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    shapes,
    shardings,
  )
