"""What `train.py` and `eval.py` have in common: from a command line to an exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import jax

from unipool_jax.config import Config, ConfigError
from unipool_jax.data.errors import DataError
from unipool_jax.kernels.implementations import platform_problem
from unipool_jax.moe.assignment import AssignmentError
from unipool_jax.moe.lock_lifecycle import LockError
from unipool_jax.training.checkpoint import CheckpointError
from unipool_jax.training.run_folder import RunError
from unipool_jax.validation import validate

EXIT_FAILED, EXIT_CONFIG = 1, 2


def guarded(main: Callable[[], int]) -> int:
    """Run `main`; what a user can put right becomes a message on stderr and an exit code, not a traceback.

    Returns:
      What `main` returned, 2 for a configuration that cannot be run, or 1 for data, checkpoint, run folder and lock
      errors.
    """
    # Orbax and Abseil log every failure with its traceback before raising it; the exception says the same once.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # The same random numbers on any number of devices.
    jax.config.update("jax_threefry_partitionable", True)
    try:
        return main()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    except (DataError, RunError, CheckpointError, LockError, AssignmentError) as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED


def run(config: Config) -> int:
    """Validate `config` and do what its `mode` says."""
    validate(config)
    if config.mode == "describe":
        from unipool_jax.model.report import describe

        print(describe(config))
        return 0
    if problem := platform_problem(config.kernels.implementation):
        raise ConfigError([problem])
    from unipool_jax.training.loop import train

    return train(config)
