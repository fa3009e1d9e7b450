"""Evaluate a checkpoint: `python eval.py [RUN] [NAME=VALUE ...]` is `unipool eval`."""

import sys

from unipool_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
