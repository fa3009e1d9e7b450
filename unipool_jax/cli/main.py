"""From the words of a command line to a command that runs."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from typing import Any

from unipool_jax.cli.commands import COMMANDS, CONFIG_DIR, HELP, MULTIRUN, PRINT_CONFIG, Command, Option, find
from unipool_jax.cli.guard import guarded
from unipool_jax.config.schema import ConfigError
from unipool_jax.config.words import from_words


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of this process; the exit code, see `guarded`."""
    words = sys.argv[1:] if words is None else words
    command, _ = find(list(words))
    return guarded(lambda: execute(words), None if command is None else command.failure)


def execute(words: Sequence[str]) -> int:
    """Run a command line; the exit code.

    Raises:
      UserError: with what to do about it.
    """
    if foreign := [word for word in words if not _is_utf8(word)]:
        problem = "not UTF-8; rename the file or folder, or name a link to it"
        raise ConfigError([f"{word}: {problem}" for word in foreign], "the command line")
    command, rest = find(list(words))
    if command is None and list(words[:1]) in (["--help"], ["-h"]):  # `unipool --help train`
        command, rest = find(list(words[1:]))
        rest = [*rest, *words[:1]]
    if command is None:
        return _without_command(rest)
    options, settings = _options(command, rest)
    config_dir = options.get(CONFIG_DIR.name)
    if config_dir is not None:
        from unipool_jax.config.compose import check_config_dir

        check_config_dir(config_dir)
    if HELP.name in options:
        from unipool_jax.cli.help import command_help

        return _show(command_help(command, config_dir))
    if not command.composes:
        kind: type[Any] = command.load_settings()
        return command.load_function()(from_words(kind, settings, config_dir))
    from unipool_jax.cli.training import Job, configured, print_configs, run_jobs, sweep_jobs

    if MULTIRUN.name in options:
        jobs = sweep_jobs(settings, config_dir)
    else:
        jobs = [Job("", configured(settings, config_dir, command.mode))]
    return print_configs(jobs) if PRINT_CONFIG.name in options else run_jobs(jobs, command.load_function())


def _is_utf8(word: str) -> bool:
    """Whether a word came as UTF-8; Python decodes other bytes to lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in word)


def _show(page: str, code: int = 0) -> int:
    """Print a page of help; `code`."""
    print(page)
    return code


def _without_command(words: list[str]) -> int:
    """`unipool --help`, `--version`, a group such as `unipool convert`, or a mistake."""
    from unipool_jax.cli.help import overview

    named = [word for word in words if word not in ("--help", "-h")]
    if not named or any(command.name.split()[:-1] == named for command in COMMANDS):
        return _show(overview(named)) if words != named else _show(overview(named), 2)
    if named == ["--version"]:
        from unipool_jax.config.version import VERSION, git_commit

        print(f"unipool_jax {VERSION} (commit {git_commit() or 'unknown'})")
        return 0
    group = [command.name.split()[1] for command in COMMANDS if command.name.split()[:-1] == named[:1]]
    known = group or list(dict.fromkeys(command.name.split()[0] for command in COMMANDS))
    wrong = named[1] if group else named[0]
    if wrong.startswith("-"):
        problem = (
            "no such option before a command; there are --help and --version, and other options follow the command"
        )
        raise ConfigError([f"{wrong}: {problem}"], "the command line")
    near = difflib.get_close_matches(wrong, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
    raise ConfigError([f"{wrong}: no such command; {hint}"], "the command line")


def _options(command: Command, words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options among `words` by name, and the other words."""
    known = {f"--{option.name}": option for option in (HELP, *command.options)} | {"-h": HELP}
    found: dict[str, str] = {}
    rest: list[str] = []
    problems: list[str] = []
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        option: Option | None = known.get(name)
        if not word.startswith("-"):
            rest.append(word)
        elif option is None:
            names = ", ".join(name for name in known if name.startswith("--"))
            problems.append(
                f"{word}: no such option; there are {names}, and settings are NAME=VALUE without dashes, also where "
                "the value begins with one"
            )
        elif option.value is None and equals:
            problems.append(f"{word}: takes no value; write {name}")
        elif option.value is None:
            found[option.name] = ""
        else:
            value = value if equals else next(left, "")
            if not value:
                problems.append(f"{name}: its value is missing; write {name} {option.value}")
            found[option.name] = value
    if problems:
        raise ConfigError(problems, "the command line")
    return found, rest
