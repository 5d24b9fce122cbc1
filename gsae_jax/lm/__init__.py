"""Text in, (logits, {site: activation}) out. Knows nothing of SAEs."""
