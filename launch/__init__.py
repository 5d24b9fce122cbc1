"""Runs on Cloud TPU, GKE or one machine: asked for, watched, taken up again."""
