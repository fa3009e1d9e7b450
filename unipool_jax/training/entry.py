"""Training as the command line starts it: validate, join other processes, train."""

from __future__ import annotations

import os

from unipool_jax.config.growth_schedule import grows
from unipool_jax.config.rules import validate
from unipool_jax.config.schema import Config, ConfigError
from unipool_jax.parallel.launch import one_of_several


def run(config: Config) -> int:
    """Train as `config` says, or print the parameter report with `mode=describe`; the exit code, see `loop.train`.

    Raises:
      ConfigError: for a configuration that cannot be run; and what `loop.train` raises.
    """
    validate(config)
    if config.mode == "describe":
        from unipool_jax.model.report import describe

        if grows(config):
            from unipool_jax.training.growth_costs import cost_lines

            print("\n".join(cost_lines(config)), end="\n\n")
        print(describe(config))
        return 0
    if one_of_several(config.distributed):
        # Before JAX is imported: what its runtime logs when it loses a process, the lines between them say better.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import jax

    from unipool_jax.kernels.implementations import attention_problem, platform_problem
    from unipool_jax.parallel.accelerators import check_platforms, warn_of_idle_accelerator
    from unipool_jax.parallel.processes import is_process_0, joined
    from unipool_jax.training.loop import train

    # The same random numbers on any number of devices.
    jax.config.update("jax_threefry_partitionable", True)
    with joined(config):
        check_platforms()
        if is_process_0():
            warn_of_idle_accelerator()
        found = platform_problem(config.kernels.implementation), attention_problem(config.kernels.attention)
        if problems := [problem for problem in found if problem is not None]:
            raise ConfigError(problems)
        return train(config)
