"""What an SAE computes. Knows nothing of training.

Axis names, here and in every file that handles SAEs: B rows of a batch,
D activation width, F features, N rows in a store, S SAEs of a group. Parameters
carry the paper's names; rows of `W_dec` are features.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jax.sharding import PartitionSpec as P

from gsae_jax.sae.gated import GatedSAE
from gsae_jax.sae.jumprelu import JumpReluSAE
from gsae_jax.sae.layers import Dictionary
from gsae_jax.sae.relu import ReluSAE, RescaleShiftSAE

ARCHITECTURES: dict[str, type[Dictionary]] = {
  'gated': GatedSAE,
  'relu': ReluSAE,
  'rescale_shift': RescaleShiftSAE,
  'jumprelu': JumpReluSAE,
}

# The others are made of trained ones.
TRAINED = ('gated', 'relu', 'rescale_shift')

# Features are spread over 'model' for every parameter; all else is everywhere.
SPECS = {
  'W_gate': P(None, 'model'),
  'W_enc': P(None, 'model'),
  'W_mag': P(None, 'model'),
  'W_dec': P('model', None),
  'b_gate': P('model'),
  'b_enc': P('model'),
  'b_mag': P('model'),
  'r_mag': P('model'),
  'threshold': P('model'),
}

# Choices that not every architecture has, and what the paper does.
VARIANTS: dict[str, Any] = {
  'encoder': 'tied',
  'freeze_aux_decoder': True,
  'centre_stop_gradient': False,
  'sparsity': 'l1',
}


def has(architecture: str, option: str) -> bool:
  """Whether an architecture has one of the `VARIANTS`, or of its attributes."""
  return option in ARCHITECTURES[architecture].__dataclass_fields__


def variant(config: Mapping[str, Any]) -> str:
  """How a member differs from the paper, in words; '' where it does not."""
  return ', '.join(
    f'{name}={config[name]}'
    for name, usual in VARIANTS.items()
    if config[name] != usual
  )


def make_module(config: Mapping[str, Any], **training: Any) -> nn.Module:
  """The SAE that a member's config, or a checkpoint's, describes.

  Args:
    config: plain data: `architecture`, `width`, `features` and the `VARIANTS`.
    training: attributes that only training has a use for; those that the
      architecture lacks are left out.
  """
  architecture = config['architecture']
  options = {name: config[name] for name in VARIANTS} | training
  return ARCHITECTURES[architecture](
    width=config['width'],
    features=config['features'],
    **{k: v for k, v in options.items() if has(architecture, k)},
  )
