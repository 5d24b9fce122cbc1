"""Where the suite's time goes: `python -m tests.timing` says so in CONTRIBUTING.md."""
