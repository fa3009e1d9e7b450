"""What `train.py` and `eval.py` have in common: from a command line to an exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable

import jax

from unipool_jax.config.rules import validate
from unipool_jax.config.schema import Config, ConfigError
from unipool_jax.data.errors import DataError
from unipool_jax.kernels.implementations import platform_problem
from unipool_jax.moe.assignment import AssignmentError
from unipool_jax.moe.lock_lifecycle import LockError
from unipool_jax.parallel.processes import PeerError, lost_peer, start
from unipool_jax.training.checkpoint import CheckpointError
from unipool_jax.training.run_folder import RunError

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
        return _leave(EXIT_CONFIG)
    except (DataError, RunError, CheckpointError, PeerError, LockError, AssignmentError) as error:
        print(error, file=sys.stderr)
        return _leave(EXIT_FAILED)
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if lost := lost_peer(error):
            print(
                f"process {jax.process_index()} stopped because it lost another one, whose output may say why: {lost}\n"
                "Start all processes again with the same command; they go on from the newest complete checkpoint.",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
        return _leave(EXIT_FAILED)


def _leave(code: int) -> int:
    """`code`; of several processes this one ends at once, for those that wait for it to notice and stop too."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def run(config: Config) -> int:
    """Validate `config` and do what its `mode` says."""
    validate(config)
    if config.mode == "describe":
        from unipool_jax.model.report import describe

        print(describe(config))
        return 0
    start(config.distributed)
    if problem := platform_problem(config.kernels.implementation):
        raise ConfigError([problem])
    from unipool_jax.training.loop import train

    return train(config)
