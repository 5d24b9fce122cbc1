"""What an SAE computes. Knows nothing of training.

Axis names, here and in every file that handles SAEs: B rows of a batch,
D activation width, F features, N rows in a store. Parameters carry the paper's
names; rows of `W_dec` are features.
"""

from gsae_jax.sae.gated import GatedSAE
from gsae_jax.sae.relu import ReluSAE

ARCHITECTURES = {'gated': GatedSAE, 'relu': ReluSAE}
