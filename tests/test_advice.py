"""Every setting and option that a message names exists, in the command that prints the message."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from unipool_jax.cli.commands import COMMANDS, HELP
from unipool_jax.config.compose import choice_files, compose_config
from unipool_jax.config.schema import Config, ConfigError, settings
from unipool_jax.config.words import fields_of

PACKAGE = Path(__file__).parents[1] / "unipool_jax"
SETTINGS = set(settings(Config()))
SECTIONS = sorted({name.partition(".")[0] for name in SETTINGS if "." in name})
OPTIONS = {f"--{option.name}" for command in COMMANDS for option in (HELP, *command.options)} | {"--version"}

OTHERS = {
    "pip": {"--no-deps"},
    "docker": {"--gpus"},
    "preprocess_data.py": {"--append-eod"},
    "complete": {"--command", "--arguments"},
    "commandline": {"--cut-at-cursor"},
}
"""Options of other programs, by a word that the message then has."""

ARGUMENTS = {
    "data/pipeline.py": {"batch_size", "rows", "sequence_length", "num_windows", "max_windows"},
    "data/token_store.py": {"workers", "shard_tokens"},
    "data/store_reader.py": {"split", "split_order"},
    "evaluation/harness.py": {"max_gen_toks"},
}
"""Arguments of functions, and settings of lm-eval, that no command line reaches under another name."""

MARKUP = {"analysis/page.py", "cli/completion.py", "planner/collectives.py"}
"""HTML, CSS, shell scripts and the text of compiled modules."""


class Message(NamedTuple):
    """A text of the program, `{}` where a value stands."""

    module: str
    line: int
    text: str


def messages(path: Path) -> Iterator[Message]:
    """The texts of a module that are no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    seen = {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    module = path.relative_to(PACKAGE).as_posix()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            seen |= {part for part in node.values if isinstance(part, ast.Constant)}
            yield Message(module, node.lineno, "".join(map(str, parts)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in seen and " " in node.value:
            yield Message(module, node.lineno, node.value)


def accepted(module: str) -> set[str]:
    """The settings, written NAME=, of the commands of a module's room; of `find_run`, which they share, `run`."""
    room = module.partition("/")[0]
    kinds = [command.load_settings() for command in COMMANDS if not command.composes]
    own = [kind for kind in kinds if kind.__module__.split(".")[1] == room]
    face = {"prompt"} if module == "__init__.py" else set()
    return {field.name for kind in own for field in fields_of(kind)} | set(choice_files()) | {"run", "mode"} | face


def unknown(message: Message) -> list[str]:
    """What a message names and nobody has."""
    text = message.text
    dotted = re.findall(rf"(?<![\w./])(?:{'|'.join(SECTIONS)})\.[a-z_]+(?![\w(/])", text)
    options = re.findall(r"(?<![\w.-])--[a-z][a-z-]*", text)
    foreign = {option for word, known in OTHERS.items() if word in text for option in known}
    found = [name for name in dotted if name not in SETTINGS and not name.endswith((".py", ".yaml", ".json", ".md"))]
    found += [option for option in options if option not in OPTIONS | foreign]
    if "`unipool " in text or "unipool tasks" in text or "unipool eval" in text:
        return found  # the command that has the setting is named
    names = re.findall(r"(?<![\w.{}\[\"'-])([a-z][a-z_]*)=(?!=)", text)
    known = accepted(message.module) | ARGUMENTS.get(message.module, set()) | SETTINGS
    return found + [name for name in names if name not in known]


def test_what_messages_name_exists() -> None:
    modules = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).as_posix() not in MARKUP]
    wrong = [(*message, found) for path in modules for message in messages(path) if (found := unknown(message))]
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("choose one with --field", ["--field"]),
        ("set train.micro_batch=4", ["train.micro_batch"]),
        ("give field=NAME", ["field"]),
        ("give field=NAME of `unipool data`", []),
        ("set train.microbatch_size=4, mesh=v5p_64 or `unipool train --help`", []),
    ],
)
def test_what_does_not_exist_is_noticed(text: str, found: list[str]) -> None:
    assert unknown(Message("training/loop.py", 1, text)) == found


@pytest.mark.parametrize("text", ["1e5", ".5e3", "true", "007", "1_000", "inf", "1e5-a"])
def test_a_text_may_look_like_a_number(text: str) -> None:
    assert compose_config([f"run.name={text}"]).run.name == text
    assert compose_config(["run.name=null"]).run.name is None


def test_advice_about_items_of_a_list_can_be_followed() -> None:
    with pytest.raises(ConfigError, match=r"data\.files\[1\]=5: .*\"data\.files=\['5'\]\""):
        compose_config(["data.files=[a,5]"])
    assert compose_config(["data.files=[a,'5']"]).data.files == ("a", "5")
