"""Command line of the analyses: `python -m unipool_jax.analysis RUN`, `compare RUN RUN ...` or `export-tasks OUT`."""

import sys

from unipool_jax.analysis.command import analyse_command
from unipool_jax.training.entry import guarded


def main(arguments: list[str]) -> int:
    """Analyse one checkpoint, compare runs, or make local tasks of benchmarks."""
    if arguments[:1] == ["compare"]:
        from unipool_jax.analysis.compare_command import compare_command

        return compare_command(arguments[1:])
    if arguments[:1] == ["export-tasks"]:
        from unipool_jax.evaluation.export_tasks import export_command

        return export_command(arguments[1:])
    return analyse_command(arguments)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
