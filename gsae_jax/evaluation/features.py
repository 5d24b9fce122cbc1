"""What each feature of an SAE does, for dashboards.

eval/step_<N>.features/contexts.safetensors   token ids and mask
eval/step_<N>.features/<member>.safetensors   one row per feature
"""

from collections.abc import Mapping

import numpy as np
import safetensors.numpy
from etils import epath

from gsae_jax.errors import UserError
from gsae_jax.evaluation.splice import Measured


def folder(workdir: epath.Path, step: int) -> epath.Path:
  """Where the features of a step are."""
  return workdir / 'eval' / f'step_{step}.features'


def of(
  measured: Measured, effects: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """The arrays of `read`, of what was measured and what directions do."""
  fired_F = measured.fired_F
  top = measured.top
  assert top is not None and measured.activation_F is not None
  return {
    'density': fired_F / measured.sums['tokens'].sum(),
    'mean_activation': measured.activation_F / np.maximum(fired_F, 1),
    'top_activations': np.asarray(top.activations_FK),
    'top_contexts': np.asarray(top.contexts_FK),
    'top_positions': np.asarray(top.positions_FK),
    **effects,
  }


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
  """A file of `read`."""
  whole = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
  return safetensors.numpy.save(whole)


def read(
  workdir: epath.Path, step: int, member: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """The features of a member, and the contexts that they point into.

  Returns:
    `density` `[F]`, share of tokens that a feature fires on, and
    `mean_activation` `[F]` where it does; `top_activations`, `top_contexts` and
    `top_positions` `[F, K]`, the contexts on which it is strongest (-1: none);
    `logit_top_ids`, `logit_top_values`, `logit_bottom_ids` and
    `logit_bottom_values` `[F, k]`, the tokens that its direction makes likelier
    and less likely (`lm.effects`); and of contexts, `ids` and `mask` `[C, L]`.

  Raises:
    UserError: they were not written, or a file of them is damaged.
  """
  found = []
  for name in (member, 'contexts'):
    path = folder(workdir, step) / f'{name}.safetensors'
    if not path.exists():
      there = sorted(p.stem for p in path.parent.glob('*.safetensors'))
      remedy = (
        f'there are {", ".join(t for t in there if t != "contexts")}'
        if there
        else "set eval.dashboards to 'all' and run gsae_jax.evaluate again"
      )
      raise UserError(f'{path} is not there; {remedy}')
    try:
      found.append(safetensors.numpy.load(path.read_bytes()))
    except (KeyError, ValueError, safetensors.SafetensorError) as e:
      raise UserError(
        f'{path} is damaged ({e}); delete step_{step}.json next to its folder and '
        'run gsae_jax.evaluate again'
      ) from e
  features, contexts = found
  return features, contexts
