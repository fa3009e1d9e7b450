"""The pages of `--help`, made from the dataclasses of settings and their docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unipool_jax.cli.commands import COMMANDS, HELP, Command
from unipool_jax.config.docs import allowed_values, field_docs
from unipool_jax.config.parsing import bare
from unipool_jax.config.ranges import RANGES, Range
from unipool_jax.config.schema import Config
from unipool_jax.config.words import Accepts, Composed, Field, Positional, fields_of

_RUN = "RUN, the folder of a run or `latest`, gives its settings, which the others change."


def overview(group: list[str]) -> str:
    """The commands, or those of a group such as `convert`."""
    shown = [command for command in COMMANDS if command.name.split()[: len(group)] == group]
    width = max(len(command.name) for command in shown)
    lines = [f"usage: unipool {' '.join([*group, 'COMMAND'])} [NAME=VALUE ...]", ""]
    lines += [f"  {command.name:{width}}  {command.summary}" for command in shown]
    lines += ["", "`unipool COMMAND --help` lists the settings of a command; `unipool --version` says which this is."]
    return "\n".join(lines)


def command_help(command: Command, config_dir: str | None = None) -> str:
    """What a command does, its settings with defaults and allowed values, and its options."""
    kind = command.load_settings()
    pages = _schema_pages(config_dir, command.mode is None) if command.composes else _request_pages(kind)
    words = " [RUN]" if command.composes else _usage(kind)
    about = textwrap.fill(f"{command.summary} {_RUN}", _width())
    description = about if command.composes else inspect.getdoc(kind) or command.summary
    parts = [f"usage: unipool {command.name}{words} [NAME=VALUE ...]", description, *pages]
    options = [_entry(f"--{o.name}{f' {o.value}' if o.value else ''}", o.help) for o in (*command.options, HELP)]
    return "\n\n".join([*parts, "\n".join(["Options", *options])])


def _usage(kind: type) -> str:
    """The words without a name, and the settings that must be given."""
    words = ""
    for field in sorted(fields_of(kind), key=lambda field: field.marker(Positional) is None):
        if field.marker(Positional) is None:
            words += f" {field.name}=VALUE" if field.default is dataclasses.MISSING else ""
        else:
            word = f"{field.name.upper()} ..." if field.several else field.name.upper()
            words += f" {word}" if field.default is dataclasses.MISSING else f" [{word}]"
    return words


def _request_pages(kind: type) -> Iterator[str]:
    """The settings of a request; what it takes of the schema comes last."""
    owners: dict[type, list[str]] = {}
    for field in fields_of(kind):
        owners.setdefault(field.owner, []).append(_field(field))
    for owner, entries in owners.items():
        title = "Settings" if owner is kind else (inspect.getdoc(owner) or "")
        yield "\n".join([title, *entries])


def _field(field: Field) -> str:
    text = field_docs(field.owner)[field.name]
    if accepts := field.marker(Accepts):
        names = (f"{name}NAME=VALUE" if name.endswith(".") else f"{name}=VALUE" for name in accepts.names)
        return _entry(", ".join(names), f"{text} `unipool train --help` lists them.")
    if field.marker(Composed):
        return _entry("GROUP=CHOICE, SECTION.NAME=VALUE", f"{text} `unipool train --help` lists them.")
    return _setting(field.name, field.kind, field.default, text, field.marker(Range))


def _schema_pages(config_dir: str | None, mode: bool) -> Iterator[str]:
    """The groups of choices, then the schema section by section; `mode` only where the command does not say it."""
    from unipool_jax.config.compose import choice_files

    for group, files in choice_files(config_dir).items():
        entries = [_entry(f"{group}={name}", _first_comment(path)) for name, path in files.items()]
        yield "\n".join([f"Choices of {group}", *entries])
    hints = typing.get_type_hints(Config)
    alone = [entry for entry in dataclasses.fields(Config) if not dataclasses.is_dataclass(bare(hints[entry.name]))]
    alone = [entry for entry in alone if mode or entry.name != "mode"]
    for entry in dataclasses.fields(Config):
        section = hints[entry.name]
        if dataclasses.is_dataclass(section):
            assert isinstance(section, type)
            head = textwrap.fill(f"Section {entry.name}: {' '.join((inspect.getdoc(section) or '').split())}", _width())
            yield "\n".join([head, *_section(section, dataclasses.fields(section), f"{entry.name}.")])
    yield "\n".join(["Without a section", *_section(Config, alone, "")])


def _section(kind: type, entries: Any, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for entry in entries:
        name = f"{prefix}{entry.name}"
        yield _setting(name, hints[entry.name], entry.default, field_docs(kind)[entry.name], RANGES.get(name))


def _setting(name: str, kind: Any, default: Any, text: str, allowed: Range | None) -> str:
    shown = "VALUE" if default is dataclasses.MISSING else _shown(default)
    required = "; must be given" if default is dataclasses.MISSING else ""
    return _entry(f"{name}={shown}", f"{text} [{allowed_values(kind, allowed)}{required}]")


def _shown(default: Any) -> str:
    """A default as on the command line."""
    if isinstance(default, tuple):
        return f"[{','.join(map(_shown, default))}]"
    if isinstance(default, float):
        return f"{default:g}"
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _entry(head: str, text: str) -> str:
    return f"  {head}\n{textwrap.fill(text, _width(), initial_indent=' ' * 6, subsequent_indent=' ' * 6)}"


def _first_comment(path: Path) -> str:
    """What a file of choices says about itself: its first lines of comment, but for the package directive."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("# "))
    return " ".join(lines) or str(path)


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 120)
