"""What a comparison of training steps is about; read by all of its processes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
  """Sizes and hyperparameters that all sides share.

  Attributes:
    width: D.
    features: F.
    batch: B.
    l0: open gates per token at the start; 0 is half of them.
    l1: coefficient of the sparsity term.
    learning_rate: of every step.
    device: 'cpu' or 'gpu'.
    steps: of a turn.
  """

  width: int
  features: int
  batch: int
  l0: float
  l1: float
  learning_rate: float
  device: str
  steps: int

  @property
  def unit(self) -> float:
    """Operations of one product of the three sizes."""
    return 2.0 * self.batch * self.width * self.features
