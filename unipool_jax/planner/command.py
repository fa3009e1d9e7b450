"""What `unipool plan` does."""

from __future__ import annotations

from unipool_jax.config.schema import Config
from unipool_jax.planner.report import make_plan, text
from unipool_jax.planner.search import search


def run(config: Config) -> int:
    """Print the plan of a valid `config`, or with `plan.search=true` the best ones found; the exit code.

    Raises:
      ConfigError: it cannot be planned, or nothing fits.
    """
    print(search(config) if config.plan.search else text(make_plan(config)))
    return 0
