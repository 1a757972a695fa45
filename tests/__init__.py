"""The test suite: `python3 -m tests` provisions what it needs and runs it."""
