"""The language model that comes with the package; README.md says what it is."""
