"""Metrics, splicing, Pareto frontiers, figures.

`metrics`, `pareto`, `figures` and `page` are plain Python: the report draws
with them from JSON alone, and needs no jax.
"""
