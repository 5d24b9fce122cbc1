"""Gated Sparse Autoencoders (arXiv 2404.16014) in JAX."""

__version__ = '0.1.0'


def __getattr__(name: str):
  # Reports and stores are read without jax, so it is imported when asked for.
  if name in ('load', 'SAE'):
    from gsae_jax import restore

    return getattr(restore, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
