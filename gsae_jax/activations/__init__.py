"""The activation store: its format, its writer and the loader."""
