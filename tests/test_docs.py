"""What the documents name exists: links, paths, and the numbers of docs/method.md that the code cites."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "results").glob("*/README.md")])
SOURCES = sorted(
    path
    for folder in ("unipool_jax", "benchmarks", "tests", "configs", "notebooks", "docs")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".md", ".ipynb", ".yaml")
)

LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)[^)]*\)")
# A path from the top of the repository, anywhere in the text; `out=results/new` names what a command will make.
TOP = r"(?:unipool_jax|benchmarks|tests|configs|docs|notebooks|launch|results)"
FROM_TOP = re.compile(rf"(?<![=\w./-])({TOP}/[\w./*-]*)")
# `moe/routing.py` is short for unipool_jax/moe/routing.py.
CODE_FILE = re.compile(r"`((?:\w+/)+\w+\.py)`")
MODULE = re.compile(r"python -m ((?:unipool_jax|benchmarks)(?:\.\w+)*)")

NUMBER = re.compile(r"\bM\d+\.\d+\b")
DEFINED = re.compile(r"^(?:### |\| )(M\d+\.\d+)\b", re.MULTILINE)
SECTION = re.compile(r"^## (M\d+)\b", re.MULTILINE)
WHOLE_SECTION = re.compile(r"\bmethod (M\d+)\b(?!\.\d)")


def method() -> str:
    return (ROOT / "docs" / "method.md").read_text()


def named_paths(page: Path) -> Iterator[tuple[str, bool]]:
    """Every path that a page names, and whether it exists."""
    text = page.read_text()
    for link in LINK.findall(text):
        yield link, (page.parent / link).exists()
    for match in FROM_TOP.findall(text):
        path = match.rstrip(".-")
        yield path, any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()
    for path in CODE_FILE.findall(text):
        yield path, (ROOT / path).exists() or (ROOT / "unipool_jax" / path).exists()
    for module in MODULE.findall(text):
        path = ROOT / module.replace(".", "/")
        yield module, path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_exists(page: Path) -> None:
    assert [path for path, exists in named_paths(page) if not exists] == []


def test_a_path_that_does_not_exist_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[a](missing.md) and unipool_jax/missing.py, `moe/missing.py`; python -m benchmarks.missing")
    assert [exists for _, exists in named_paths(page)] == [False] * 4


def test_numbers_of_the_method_are_unique() -> None:
    numbers = DEFINED.findall(method())
    assert len(numbers) > 80
    assert len(numbers) == len(set(numbers))


def test_every_cited_number_is_in_the_method() -> None:
    numbers, sections = set(DEFINED.findall(method())), set(SECTION.findall(method()))
    cited = {
        number: path.relative_to(ROOT).as_posix()
        for path in SOURCES
        for text in [path.read_text()]
        for number in [*NUMBER.findall(text), *WHOLE_SECTION.findall(text)]
    }
    assert len(cited) > 30
    assert {number: path for number, path in cited.items() if number not in numbers | sections} == {}


def test_nothing_cites_a_specification_that_readers_do_not_have() -> None:
    pattern = re.compile(r"\bspec(?:ification)?\s+(?:section\s+)?[A-K](?:\.?\d|\b)")
    assert [path.relative_to(ROOT).as_posix() for path in SOURCES if pattern.search(path.read_text())] == []


def test_entries_of_the_log_are_dated_newest_first() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "docs" / "log.md").read_text(), re.MULTILINE)
    dates = [re.match(r"\d{4}-\d\d-\d\d(?= \S)", heading) for heading in headings]
    assert [heading for heading, date in zip(headings, dates, strict=True) if date is None] == []
    found = [date.group() for date in dates if date is not None]
    assert found == sorted(found, reverse=True)
