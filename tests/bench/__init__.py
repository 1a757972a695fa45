"""The benchmark: `python3 -m tests.bench`."""
