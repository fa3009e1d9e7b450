"""Training as the command line starts it: validate, join other processes, train."""

from __future__ import annotations

import jax

from unipool_jax.config.rules import validate
from unipool_jax.config.schema import Config, ConfigError
from unipool_jax.kernels.implementations import platform_problem
from unipool_jax.parallel.processes import start


def run(config: Config) -> int:
    """Train as `config` says, or print the parameter report with `mode=describe`; the exit code, see `loop.train`.

    Raises:
      ConfigError: for a configuration that cannot be run; and what `loop.train` raises.
    """
    validate(config)
    if config.mode == "describe":
        from unipool_jax.model.report import describe

        print(describe(config))
        return 0
    # The same random numbers on any number of devices.
    jax.config.update("jax_threefry_partitionable", True)
    start(config.distributed)
    if problem := platform_problem(config.kernels.implementation):
        raise ConfigError([problem])
    from unipool_jax.training.loop import train

    return train(config)
