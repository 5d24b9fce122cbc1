"""State, one pure train step, resampling, checkpoints, the loop."""
