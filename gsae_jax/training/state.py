"""A member's state, how it is born sharded, and how it is written down."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Features are spread over 'model' for every parameter and everything that
# mirrors one. A leaf takes the spec of its own name.
SPECS = {
  'W_gate': P(None, 'model'),
  'W_enc': P(None, 'model'),
  'W_dec': P('model', None),
  'b_gate': P('model'),
  'b_enc': P('model'),
  'b_mag': P('model'),
  'r_mag': P('model'),
  'steps_since_fired': P('model'),
}

# Parameters in the units of the activations; the others have no unit.
_BIASES = ('b_gate', 'b_mag', 'b_enc', 'b_dec')

# Adam with beta1 = 0 (paper D.1.1): the first moment is the gradient itself,
# so none is kept. Same numbers as optax.adam(b1=0, b2=0.999, eps=1e-8).
OPTIMIZER = optax.scale_by_rms(
  decay=0.999, eps=1e-8, eps_in_sqrt=False, bias_correction=True
)


class MemberState(NamedTuple):
  """Everything that one SAE's training carries from step to step.

  Attributes:
    step: int32, steps taken.
    params: the SAE's parameters, for activations times the run's scale.
    opt_state: Adam's second moments and count.
    steps_since_fired: int32 `[F]`, 0 where the feature fired in the last batch.
  """

  step: jax.Array
  params: dict[str, jax.Array]
  opt_state: Any
  steps_since_fired: jax.Array


def shardings(mesh: Mesh, tree: Any) -> Any:
  """A NamedSharding for each leaf of a member's state, by its name."""

  def named(path, _):
    key = path[-1]
    name = getattr(key, 'key', None) or getattr(key, 'name', None)
    return NamedSharding(mesh, SPECS.get(name, P()))

  return jax.tree_util.tree_map_with_path(named, tree)


def abstract_member(module: nn.Module, mesh: Mesh) -> MemberState:
  """Shapes, dtypes and shardings of a member's state, allocating nothing."""
  shapes = jax.eval_shape(functools.partial(_init, module), jax.random.key(0))
  return _placed(shapes, mesh)


def _placed(shapes: Any, mesh: Mesh) -> Any:
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    shapes,
    shardings(mesh, shapes),
  )


def init_member(module: nn.Module, mesh: Mesh, *, seed: int) -> MemberState:
  """A fresh state, born sharded over the mesh; the same on any mesh."""
  placed = jax.tree.map(lambda a: a.sharding, abstract_member(module, mesh))
  init = jax.jit(functools.partial(_init, module), out_shardings=placed)
  return init(jax.random.key(seed))


def _init(module: nn.Module, key: jax.Array) -> MemberState:
  params = module.init(key, jnp.zeros((1, module.width)))['params']
  return MemberState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=OPTIMIZER.init(params),
    steps_since_fired=jnp.zeros(module.features, jnp.int32),
  )


def fold_scale(
  params: dict[str, jax.Array], scale: jax.Array
) -> dict[str, jax.Array]:
  """Parameters for raw activations, from those trained on `scale * x`.

  Encoders and decoder have no unit, so only the biases change: decoder rows
  stay unit and features come out in the units of the raw activations.
  """
  return {k: v / scale if k in _BIASES else v for k, v in params.items()}


def to_checkpoint(state: MemberState, scale: jax.Array) -> dict[str, Any]:
  """The state as plain dictionaries, `params` for raw activations.

  The biases are kept in both units, because dividing and multiplying again
  would not give the same bits to a resumed run.
  """
  return {
    'params': fold_scale(state.params, scale),
    'scaled_biases': {k: v for k, v in state.params.items() if k in _BIASES},
    'opt_state': {'count': state.opt_state.count, 'nu': state.opt_state.nu},
    'steps_since_fired': state.steps_since_fired,
    'step': state.step,
  }


def from_checkpoint(saved: dict[str, Any]) -> MemberState:
  """The inverse of `to_checkpoint`, to the bit."""
  params = saved['params'] | saved['scaled_biases']
  opt_state = jax.eval_shape(OPTIMIZER.init, params)
  return MemberState(
    step=saved['step'],
    params=params,
    opt_state=opt_state._replace(**saved['opt_state']),
    steps_since_fired=saved['steps_since_fired'],
  )


def abstract_checkpoint(module: nn.Module, mesh: Mesh) -> dict[str, Any]:
  """What `to_checkpoint` gives, as shapes, dtypes and shardings."""
  shapes = jax.eval_shape(to_checkpoint, abstract_member(module, mesh), 1.0)
  return _placed(shapes, mesh)
