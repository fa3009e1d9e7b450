"""Damage done on purpose, many times at random: `python -m benchmarks.drills.NAME [--seed N] [--count N]`."""
