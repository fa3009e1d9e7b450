"""Which zero-shot tasks to run: parses the command line, without lm-eval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from unipool_jax.config.schema import ConfigError
from unipool_jax.training.run_folder import RunError

PAPER = ("arc_easy", "arc_challenge", "piqa", "hellaswag", "winogrande", "lambada_openai", "race")
"""The seven tasks of arXiv 2605.06665 (method M8.5), by their names in lm-eval."""

_NUMBERS: dict[str, tuple[str, Callable[[int], bool]]] = {
    "limit": ("a whole number, 1 or more", lambda value: value >= 1),
    "num_fewshot": ("a whole number, 0 or more", lambda value: value >= 0),
}
WORDS = ("tasks", "tasks_path", *_NUMBERS)


@dataclass(frozen=True)
class TaskRequest:
    """Tasks to run; the command line sets each field by its name."""

    tasks: tuple[str, ...] = ()
    """Names of tasks; empty is all of `tasks_path`."""
    tasks_path: str | None = None
    """Folder of local tasks (YAML files of lm-eval); None uses lm-eval's own tasks, which download their data."""
    limit: int | None = None
    """Maximum number of documents per task, from the first; None is all."""
    num_fewshot: int | None = None
    """Solved examples before each question; None is the task's default, mostly 0."""


def split_words(arguments: Sequence[str]) -> tuple[TaskRequest | None, list[str]]:
    """The task request of a command line, None if it has no words about tasks, and the other words.

    `tasks=paper` stands for the seven tasks of the paper.

    Raises:
      ConfigError: with every word about tasks that is not understood.
    """
    problems: list[str] = []
    found: dict[str, Any] = {}
    rest: list[str] = []
    for word in arguments:
        name, equals, text = word.partition("=")
        if not equals or name not in WORDS:
            rest.append(word)
        elif name == "tasks":
            names = _names(text)
            if names:
                found["tasks"] = PAPER if names == ["paper"] else tuple(dict.fromkeys(names))
            else:
                problems.append(f"{word}: expected tasks=[NAME,NAME] or tasks=paper, the tasks {', '.join(PAPER)}")
        elif name == "tasks_path":
            found[name] = text
        else:
            allowed, sound = _NUMBERS[name]
            if text.isdigit() and sound(int(text)):
                found[name] = int(text)
            else:
                problems.append(f"{word}: expected {allowed}")
    if found and not found.get("tasks") and not found.get("tasks_path"):
        problems.append("tasks=: which tasks? Give tasks=[NAME,NAME], tasks=paper or tasks_path=FOLDER")
    if problems:
        raise ConfigError(problems)
    return (TaskRequest(**found) if found else None), rest


def _names(text: str) -> list[str]:
    """The names in `[a,b]` or `a`; nothing where `text` is neither."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return []
    names = value if isinstance(value, list) else [value]
    return names if all(isinstance(name, str) and name for name in names) else []


def require_harness() -> None:
    """Raises RunError if the optional lm-eval is missing; otherwise `evaluation.harness` can be imported."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise RunError(
            f'tasks=: zero-shot tasks need lm-eval ({error}); in the checkout: pip install ".[harness]"'
        ) from error
