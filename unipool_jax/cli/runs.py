"""A run on the command line of `train`, `plan` and `describe`: its settings are those that the other words change."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from unipool_jax.config.compose import Choices, Folder, choice_files
from unipool_jax.config.schema import Config, ConfigError, DistributedConfig, settings
from unipool_jax.config.words import NAMED

ADDED = "train.steps=+"
"""Begins the word that extends a run."""


def take_run(words: Sequence[str], config_dir: Folder | None = None) -> tuple[str | None, list[str]]:
    """The run that `words` name, as `run=RUN` or the first word without a name; and the other words.

    Raises:
      ConfigError: two runs.
    """
    known = {*choice_files(config_dir), *settings(Config())}
    known |= {name.rpartition(".")[0] for name in known}
    named, others = [], []
    for word in words:
        if word.startswith("run="):
            named.append(word.removeprefix("run="))
        elif NAMED.fullmatch(word) or word in known or word[:1] in ("~", "+", "=", ""):
            others.append(word)
        else:
            named.append(word)
    if len(named) > 1:
        raise ConfigError(
            [f"{', '.join(named)}: one run can be named, and settings are written NAME=VALUE"], "the command line"
        )
    return (named[0], others) if named else (None, others)


def run_config(run: str, words: Sequence[str], config_dir: Folder | None, mode: str) -> Config:
    """The configuration of a run with the settings of `words`.

    Where it lies is what `run` says, and how it was started is forgotten: addresses of processes belong to a command.
    With `mode=train` the run goes on, and `train.steps=+N` or a larger `train.steps` extends it.

    Raises:
      ConfigError: words that cannot be applied.
      RunError: there is no such run, or it cannot be extended.
    """
    from unipool_jax.config.compose import load_config
    from unipool_jax.training.extension import with_more_steps
    from unipool_jax.training.opening import relocated
    from unipool_jax.training.run_folder import CONFIG, find_run

    folder = find_run(run)
    stored = load_config(folder / CONFIG)
    place = folder if folder.name not in ("", "..") else folder.resolve()
    kept = dataclasses.replace(stored.run, dir=str(place.parent), name=place.name, resume="auto")
    base = dataclasses.replace(stored, run=kept, distributed=DistributedConfig(), mode="train")
    # The working folder may be another than that of training, and have files of the same names.
    base = dataclasses.replace(base, data=relocated(folder, stored).data)
    added = [word for word in words if word.startswith(ADDED)]
    choices = Choices((*(word for word in words if word not in added), f"mode={mode}"), config_dir)
    config = choices.onto(base)
    more = None if not added else _more(added)
    if mode != "train":
        return config if more is None else _longer(config, config.train.steps + more)
    return with_more_steps(Path(folder), stored, config, more)


def refuse_added(words: Sequence[str]) -> None:
    """Raise ConfigError for `train.steps=+N` without a run, which would mean N steps."""
    if added := [word for word in words if word.startswith(ADDED)]:
        raise ConfigError(
            [f"{added[0]}: adds steps to a run, and no run is named; unipool train RUN {added[0]}"], "the command line"
        )


def _more(words: Sequence[str]) -> int:
    text = words[0].removeprefix(ADDED)
    if len(words) > 1 or not text.isascii() or not text.isdigit() or not int(text):
        raise ConfigError([f"{' '.join(words)}: give one number of steps to add, for example {ADDED}2000"])
    return int(text)


def _longer(config: Config, steps: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
