"""`unipool train`, `plan` and `describe`: commands whose settings are a whole configuration."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from unipool_jax.cli.runs import refuse_added, run_config, take_run
from unipool_jax.config.compose import Folder, compose_config, config_yaml, sweep
from unipool_jax.config.errors import UserError
from unipool_jax.config.rules import problems, validate
from unipool_jax.config.schema import Config, ConfigError


def configured(words: Sequence[str], config_dir: Folder | None, mode: str | None) -> Config:
    """The configuration that `words` compose, for a command with this value of `mode`.

    Raises:
      ConfigError: words that cannot be applied.
      RunError: a run is named that does not exist, or cannot be extended.
    """
    given = [word for word in words if word.partition("=")[0] == "mode"]
    if given and mode is not None:
        raise ConfigError([f"{given[0]}: `unipool {mode}` says so already; leave it out"])
    run, others = take_run(words, config_dir)
    if run is not None:
        if given:
            raise ConfigError([f"{given[0]}: use `unipool {given[0].partition('=')[2]} {run}`"])
        return run_config(run, others, config_dir, mode or "train")
    refuse_added(words)
    return compose_config([*words, *([] if mode is None else [f"mode={mode}"])], config_dir)


def start(config: Config) -> int:
    """Do what `mode` says; the exit code."""
    validate(config)
    if config.mode == "plan":
        from unipool_jax.planner import command

        return command.run(config)
    if config.mode == "train" and not config.distributed.process_id:
        # The first sign of life: JAX takes seconds to import and to find its devices.
        from unipool_jax.training.run_folder import run_folder

        print(f"{run_folder(config)}: starting", flush=True)
    from unipool_jax.training.entry import run

    return run(config)


class Job(NamedTuple):
    """One run of a sweep, or the only run of a command."""

    name: str
    """The words in which it differs from the other runs."""
    config: Config


def run_jobs(jobs: Sequence[Job], start: Callable[[Config], int]) -> int:
    """Start one after another; the exit code of the first that fails."""
    for number, job in enumerate(jobs, 1):
        if job.name:
            print(f"run {number} of {len(jobs)}: {job.name}", flush=True)
        if code := start(job.config):
            if number < len(jobs):
                print(
                    f"exit code {code}: the {len(jobs) - number} runs after this one were not started", file=sys.stderr
                )
            return code
    return 0


def print_configs(jobs: Sequence[Job]) -> int:
    """Print configurations as the file config.yaml of a run has them, as one or several documents of YAML."""
    print("---\n".join(config_yaml(job.config) for job in jobs), end="")
    return 0


def sweep_jobs(words: Sequence[str], config_dir: Folder | None = None) -> list[Job]:
    """A job for every combination of values with commas.

    Raises:
      ConfigError: with every problem of every combination, and for two runs that would share a folder.
    """
    if (run := take_run(words, config_dir)[0]) is not None:
        raise ConfigError([f"{run}: --multirun trains new runs; leave the run out"], "the command line")
    refuse_added(words)
    lines = sweep(words, config_dir)
    found: list[str] = []
    jobs: list[Job] = []
    for line in lines:
        # Words keep their places in every line.
        varied = [word for word, *others in zip(line, *lines, strict=True) if set(others) != {word}]
        name = " ".join(varied or line)
        try:
            jobs.append(Job(name, compose_config(line, config_dir)))
            found += [f"{name}: {problem}" for problem in problems(jobs[-1].config)]
        except ConfigError as error:
            found += [f"{name}: {problem}" for problem in error.problems]
    found += _shared_folders(jobs)
    found += [] if found else _refused_folders(jobs)
    if found:
        raise ConfigError(found)
    return jobs


def _refused_folders(jobs: Sequence[Job]) -> Iterator[str]:
    """What would stop a run when its turn comes: what is in its folder."""
    from unipool_jax.training.run_folder import check_run_folder

    for job in jobs:
        if job.config.mode == "train":
            try:
                check_run_folder(job.config)
            except UserError as error:
                yield f"{job.name}: {error}"


def _shared_folders(jobs: Sequence[Job]) -> Iterator[str]:
    from unipool_jax.training.run_names import run_folder

    owners: dict[Path, str] = {}
    for job in jobs:
        if job.config.mode == "train":
            folder = run_folder(job.config)
            if (owner := owners.setdefault(folder, job.name)) is not job.name:
                yield (
                    f"{job.name}: its run folder {folder} is that of {owner} too; say in run.name what is swept, for "
                    "example 'run.name=${method_name}-seed${train.seed}'"
                )
