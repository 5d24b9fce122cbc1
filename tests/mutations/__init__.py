"""Small mutations of the code, each of which a test must catch."""
