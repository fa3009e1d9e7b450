"""Evaluate a checkpoint: `python eval.py [run=FOLDER|latest] [checkpoint=FOLDER] [step=N] [data.files=[TEXT]]`."""

import sys

from unipool_jax.training.entry import guarded
from unipool_jax.training.eval_command import evaluate_command

if __name__ == "__main__":
    sys.exit(guarded(lambda: evaluate_command(sys.argv[1:])))
