"""What `unipool plan` does."""

from __future__ import annotations

from unipool_jax.config.rules import validate
from unipool_jax.config.schema import Config
from unipool_jax.planner.report import make_plan, text
from unipool_jax.planner.search import search


def run(config: Config) -> int:
    """Print the plan of `config`, or with `plan.search=true` the best ones found; the exit code.

    Raises:
      ConfigError: for a configuration that cannot be run or planned, or of which nothing fits.
    """
    validate(config)
    print(search(config) if config.plan.search else text(make_plan(config)))
    return 0
