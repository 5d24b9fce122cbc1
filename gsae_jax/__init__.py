"""Gated Sparse Autoencoders (arXiv 2404.16014) in JAX."""
