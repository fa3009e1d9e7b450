"""`python -m unipool_jax` is the command `unipool`."""

import sys

from unipool_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
