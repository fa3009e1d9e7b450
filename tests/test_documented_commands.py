"""Every command line and every setting in the documents is understood by the command line as it is."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from unipool_jax.cli.commands import COMMANDS, MULTIRUN, Command
from unipool_jax.cli.guard import EXIT_FAILED, EXIT_UNREAD
from unipool_jax.cli.runs import take_run
from unipool_jax.cli.training import sweep_jobs
from unipool_jax.config.compose import compose_config
from unipool_jax.config.rules import problems
from unipool_jax.config.schema import Config, ConfigError, settings
from unipool_jax.config.words import fields_of, from_words
from unipool_jax.training.loop import EXIT_LOSS_EXCESS, EXIT_NONFINITE

ROOT = Path(__file__).parent.parent
PATTERNS = ("*.md", "docs/*.md", "results/*/README.md", "notebooks/*.ipynb")
PAGES = sorted(page for pattern in PATTERNS for page in ROOT.glob(pattern))
# Records of the past keep the names of their time.
PAGES = [page for page in PAGES if page.name not in ("CHANGELOG.md", "log.md")]
SECTIONS = sorted({name.partition(".")[0] for name in settings(Config()) if "." in name})
OWN_SETTINGS = {field.name for one in COMMANDS if not one.composes for field in fields_of(one.load_settings())}
# `model.num_layers`, but not `train.py`.
SETTING = re.compile(rf"`(?:unipool \w+ )?((?:{'|'.join(SECTIONS)})\.(?!py\b)\w+)(?:=[^`\s]*)?(?:[`\s])")
PLACEHOLDER = re.compile(r"\.\.\.|…|NAME|VALUE|<\w+>|\bFILE\b|\bRUN\b|SCALE|PRESET|HOST|DIR\b|=$|\$[a-z]")


def text_of(page: Path) -> str:
    """The words of a page; of a notebook, its Markdown."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return text


def command_lines(page: Path) -> Iterator[str]:
    """`unipool ...` in code blocks and between backquotes; what has a placeholder in it is left out."""
    text = text_of(page).replace("\\\n", " ")
    blocks = re.findall(r"^(?: {4}|\t)+(.*)$", text, re.MULTILINE)
    for fence in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        blocks += fence.splitlines()
    inline = [re.sub(r"\s+", " ", line) for line in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    for line in blocks + inline:
        line = re.sub(r"^\w+=\S* (?=unipool)", "", line.strip()).partition(" #")[0].strip().removesuffix("&").strip()
        line = re.sub(r"^(?:\.venv/bin/)?python (train|eval)\.py\b", r"unipool \1", line)
        if line.startswith("unipool ") and not PLACEHOLDER.search(line):
            yield line


def understood(line: str) -> list[str]:
    """What is wrong with a command line; makes the text that it names, in the current folder."""
    line = line.replace("$PILE", "data.stores=[stores/pile/00,stores/pile/01]")
    _, *words = shlex.split(line)
    found = [command for command in COMMANDS if command.name.split() == words[: len(command.name.split())]]
    if not found:
        groups = {command.name.split()[0] for command in COMMANDS}
        return [] if words[0].startswith("-") or (words[0] in groups and len(words) == 1) else ["no such command"]
    command: Command = max(found, key=lambda one: len(one.name.split()))
    words = words[len(command.name.split()) :]
    known = {"--help", *(f"--{option.name}" for option in command.options)}
    wrong = [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]
    if wrong or "--help" in words:
        return [f"no such option: {word}" for word in wrong]
    rest = [word for word in words if not word.startswith("--")]
    if not command.composes:
        # What the shell expands is two files.
        expanded = [word.replace("*", end) for word in rest for end in ("12" if "*" in word else "1")]
        if rest:
            from_words(command.load_settings(), expanded)
        return []
    for setting, ends in (("data.stores", (".bin", ".idx")), ("data.files", ("",))):
        for value in re.findall(rf"{re.escape(setting)}=\[?([^]]*)", " ".join(rest)):
            for name, end in itertools.product(value.split(","), ends):
                path = Path(name.replace("**/", "").replace("*", "1") + end)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    if "data=trig_rewrite" in rest:  # what `unipool trig data` leaves
        Path("trig").mkdir()
        for name in ("train.jsonl", "tokenizer.json"):
            Path("trig", name).touch()
    if f"--{MULTIRUN.name}" in words:
        sweep_jobs(rest)
        return []
    run, rest = take_run(rest, None)
    if run is not None:  # of the scale that it is called after, or the demo
        rest = [*(["scale=182m"] if run.endswith("182m") else []), *(word.replace("=+", "=") for word in rest)]
    return problems(compose_config([*rest, *([f"mode={command.mode}"] if command.mode else [])]))


CASES = sorted({(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in command_lines(page)})


@pytest.mark.parametrize(("page", "line"), CASES, ids=[f"{page}: {line}" for page, line in CASES])
def test_a_documented_command_is_understood(
    page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert understood(line) == []


FITTING = {"pool.groups=6,4,2": "pool.groups=3,2", "pool.experts=96,64,48": "pool.experts=48,32,24"}


@pytest.mark.parametrize("line", [line for page, line in CASES if page == "docs/sweeps.md" and "$PILE" in line])
def test_sweeps_fit_the_demo_with_the_sizes_that_the_page_gives(line: str) -> None:
    demo = line.replace("scale=182m $PILE", "scale=demo")
    for published, fitting in FITTING.items():
        assert f"`{fitting}`" in text_of(ROOT / "docs" / "sweeps.md")
        demo = demo.replace(published, fitting)
    assert understood(demo) == []


def test_commands_are_found() -> None:
    """The reader of pages reads something, and sees what is wrong."""
    assert len(CASES) > 60
    assert understood("unipool trian") == ["no such command"]
    assert understood("unipool train --multi") == ["no such option: --multi"]
    assert understood("unipool train pool.groups=4")[0].startswith("pool.groups=4: must divide")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_settings_exist(page: Path) -> None:
    named = set(SETTING.findall(text_of(page)))
    known = set(settings(Config())) | OWN_SETTINGS
    assert sorted(named - known) == []


def test_every_exit_code_is_documented() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", text_of(ROOT / "docs" / "runs.md"), re.MULTILINE)}
    signals = {128 + number for number in (signal.SIGINT, signal.SIGTERM)}
    own = {EXIT_FAILED, ConfigError.exit_code, EXIT_NONFINITE, EXIT_LOSS_EXCESS, EXIT_UNREAD}
    assert codes == {0} | own | signals
