"""What must hold on a bad day: `python3 -m tests.chaos`."""
