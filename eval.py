"""Evaluate a checkpoint: `python eval.py [run=FOLDER|latest] [checkpoint=FOLDER] [step=N]`, then what on:

splits of its text, `data.files=[TEXT]`, or zero-shot tasks, `tasks=[NAME,NAME]`.
"""

import sys

from unipool_jax.evaluation.task_request import split_words
from unipool_jax.evaluation.text import evaluate_command
from unipool_jax.training.entry import guarded


def main(arguments: list[str]) -> int:
    """Loss on text, or scores of tasks where the command line names some."""
    tasks, rest = split_words(arguments)
    if tasks is None:
        return evaluate_command(rest)
    from unipool_jax.evaluation.tasks_command import tasks_command

    return tasks_command(tasks, rest)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
