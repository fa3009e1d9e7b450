"""`unipool completion SHELL`: scripts that call back for the words which may follow."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from unipool_jax.cli.commands import COMMANDS, CONFIG_DIR, HELP, Command, find
from unipool_jax.config.docs import choices
from unipool_jax.config.schema import Config, settings
from unipool_jax.config.words import Accepts, Composed, Positional, fields_of, kind_of

# Bash breaks words at = and :, so what stands before the last of them is there already.
_BASH = """\
_unipool() {
    local line="${COMP_LINE:0:COMP_POINT}" word found
    word="${line##*[[:space:]]}"
    COMPREPLY=()
    while IFS= read -r found; do
        COMPREPLY+=("${found#"${word%"${word##*[=:]}"}"}")
    done < <(unipool completion words "$line")
}
complete -o nospace -o default -F _unipool unipool
"""
_ZSH = """\
#compdef unipool
_unipool() {
    local -a found
    found=("${(@f)$(unipool completion words "${LBUFFER}")}")
    if [[ -n "${found[1]}" ]]; then compadd -Q -S '' -- "${found[@]}"; else _files; fi
}
compdef _unipool unipool
"""
_FISH = """\
complete --command unipool --arguments '(unipool completion words (commandline --cut-at-cursor))'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


@dataclass(frozen=True)
class CompletionRequest:
    """Print the completion script of a shell.

    Have your shell read it when it starts.

        source <(unipool completion bash)                                       bash, in ~/.bashrc
        source <(unipool completion zsh)                                        zsh, in ~/.zshrc after compinit
        unipool completion fish > ~/.config/fish/completions/unipool.fish       fish
    """

    shell: Annotated[Literal["bash", "zsh", "fish", "words"], Positional()]
    """The shell. The scripts themselves use `words`, which prints what may follow line."""
    line: Annotated[str, Positional()] = "unipool "
    """A command line up to the cursor."""


def completion_command(request: CompletionRequest) -> int:
    """Print a script, or the candidates for a line."""
    if request.shell == "words":
        print("\n".join(candidates(request.line)))
    else:
        print(SCRIPTS[request.shell], end="")
    return 0


def candidates(line: str) -> list[str]:
    """Words that may stand where the last word of `line` stands; a setting ends in `=`, a finished word in a blank."""
    words = _split(line)
    begun, before = words[-1], words[1:-1]
    command, given = find(before)
    if command is None:
        names = [c.name.split() for c in COMMANDS if c.name.split()[: len(before)] == before]
        found: Iterable[str] = [f"{name[len(before)]} " for name in names]
        found = [*found, "--help ", *(["--version "] if not before else [])]
    else:
        found = _words(command, given, begun)
    return [word for word in dict.fromkeys(found) if word.startswith(begun)]


def _split(line: str) -> list[str]:
    """The words of a line that may end within one; the last word is empty after a blank."""
    for quote in ("", '"', "'"):
        try:
            words = shlex.split(line + quote)
        except ValueError:
            continue
        return [*words, ""] if not quote and line[-1:].isspace() else words
    return line.split(" ")


def _words(command: Command, given: list[str], begun: str) -> Iterator[str]:
    name, equals, text = begun.partition("=")
    config_dir = _config_dir(given)
    if begun.startswith("-"):
        yield from (f"--{option.name} " for option in (*command.options, HELP))
    elif equals:
        yield from (f"{name}={value}" for value in _values(command, name, text, config_dir))
    else:
        positional, names = _names(command, config_dir)
        yield from (f"{known}=" for known in names)
        yield from (f"{value} " for value in _values(command, positional, begun, config_dir) if positional)


def _config_dir(given: list[str]) -> str | None:
    """The user's folder of choices, among the words of a line."""
    option = f"--{CONFIG_DIR.name}"
    following = iter(given)
    for word in following:
        name, equals, value = word.partition("=")
        if name == option:
            return value if equals else next(following, None)
    return None


def _names(command: Command, config_dir: str | None) -> tuple[str, list[str]]:
    """The first setting that needs no name, empty without one, and the names of all settings."""
    kind = command.load_settings()
    if kind is Config:
        return "run", ["run", *_schema_names(command.mode is None, config_dir)]
    positional, names = "", []
    for field in fields_of(kind):
        if accepts := field.marker(Accepts):
            names += [name for name in settings(Config()) if name in accepts]
        elif field.marker(Composed):
            names += _schema_names(False, config_dir)
        else:
            names.append(field.name)
            positional = positional or (field.name if field.marker(Positional) else "")
    return positional, names


def _schema_names(mode: bool, config_dir: str | None) -> list[str]:
    from unipool_jax.config.compose import choice_files

    return [*choice_files(config_dir), *(name for name in settings(Config()) if mode or name != "mode")]


def _values(command: Command, name: str, text: str, config_dir: str | None) -> list[str]:
    """Known values of a setting."""
    kind = command.load_settings()
    fields = {} if kind is Config else {field.name: field for field in fields_of(kind)}
    if kind is Config and name == "run":
        return _runs(text)
    if name in fields:
        return _runs(text) if name in ("run", "runs") else list(choices(fields[name].kind))
    if name in settings(Config()):
        return list(choices(kind_of(name)))
    from unipool_jax.config.compose import choice_files

    return list(choice_files(config_dir).get(name, ()))


def _runs(text: str) -> list[str]:
    """Folders of runs beside the one begun, `runs/` at first."""
    folder = Path(text).parent if "/" in text else Path("runs")
    return ["latest", *(str(path.parent) for path in sorted(folder.glob("*/config.yaml")))]
