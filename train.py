"""Train a model: `python train.py [scale=...] [method=...] [data=...] [NAME=VALUE ...]` is `unipool train`."""

import sys

from unipool_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
