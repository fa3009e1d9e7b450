"""Retrieval tasks made of Python sources."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from unipool_jax.cli.main import execute
from unipool_jax.config.files import FileError
from unipool_jax.retrieval.baselines import bm25_scorer, random_scorer
from unipool_jax.retrieval.folder import make_index, read_collection
from unipool_jax.retrieval.library import (
    Function,
    ccr_pairs,
    digest,
    divided,
    docstring_pairs,
    functions,
    held_out,
    library_tasks,
    pair_collection,
    standard_library,
    training_sources,
)
from unipool_jax.retrieval.metrics import measure
from unipool_jax.retrieval.search import search

SOURCE = '''
def plain(x):
    """Return x. It is not
    changed.

    And so on.
    """
    # nothing to do
    return x

class Box:
    """Not a function."""

    async def open(self):
        """Open the box, v1.2 of it"""
        def inner():
            "Inner one!"
            return "é"

        return inner

def only_words():
    """Nothing else."""

def one_line(): "In one line."; return 1

def shared():
    """Shares a line."""; return 1

def undocumented():
    return 2
'''
CODES = {
    "m.py:plain:2": ("Return x.", "def plain(x):\n    # nothing to do\n    return x"),
    "m.py:Box.open:14": (
        "Open the box, v1.2 of it",
        'async def open(self):\n    def inner():\n        "Inner one!"\n        return "é"\n\n    return inner',
    ),
    "m.py:Box.open.inner:16": ("Inner one!", 'def inner():\n    return "é"'),
}


BM25 = {"60826f9f0dd711c8": 0.3073, "bae6fff072c78e29": 0.5474}
"""nDCG@10 on the queries to test on, by digest: of CPython 3.11.7."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    for name in ("m.py", "test/t.py", "site-packages/p.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(SOURCE, encoding="utf-8")
    (folder / "bad.py").write_text("def broken(:\n")
    (folder / "latin.py").write_bytes(b"# \xff\n")
    return folder


def test_functions_and_first_sentences(library: Path) -> None:
    assert {one.name: one[1:] for one in functions(library)} == CODES


def test_texts_are_there_once() -> None:
    found = [Function("a", "s1", "c1"), Function("b", "s1", "c2"), Function("c", "s2", "c1"), Function("d", "s3", "c3")]
    assert docstring_pairs(found) == [("a", "s1", "c1"), ("d", "s3", "c3")]


def test_cuts_are_between_40_and_70_percent() -> None:
    found = [Function(f"f{number}", "", f"{number:03} " * 50) for number in range(300)]
    pairs = ccr_pairs(found, seed=0)
    assert all(head + tail == one.code for (_, head, tail), one in zip(pairs, found, strict=True))
    shares = np.array([len(head) / 200 for _, head, _ in pairs])
    assert 0.4 <= shares.min() < 0.42
    assert 0.68 < shares.max() <= 0.7
    assert ccr_pairs(found[7:], 0) == pairs[7:]
    assert ccr_pairs(found, 1) != pairs


def test_a_file_is_trained_on_or_tested_on() -> None:
    pairs = [(f"f{number % 200}.py:f:{number}", f"q{number}", f"d{number}") for number in range(800)]
    parts = divided(pair_collection(pairs), seed=0)
    files = {part: {name.partition(":")[0] for name in found.queries} for part, found in parts.items()}
    assert not files["train"] & files["test"]
    assert len(files["train"] | files["test"]) == 200
    assert 25 <= len(files["test"]) <= 55
    assert all(list(found.queries) == list(found.grades) for found in parts.values())
    assert len(parts["test"].documents) == 800
    assert divided(pair_collection(pairs), 1)["test"] != parts["test"]
    assert {file for file in files["train"] | files["test"] if held_out(file, 0)} == files["test"]


def test_text_to_pretrain_on_has_no_tested_file(library: Path) -> None:
    seeds = {held_out("m.py", seed): seed for seed in range(20)}
    assert list(training_sources(library, seeds[False])) == [SOURCE]
    assert list(training_sources(library, seeds[True])) == []


def test_the_command_writes_collections(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["retrieval", "data", f"out={tmp_path}", f"library={library}"]) == 0
    tasks = library_tasks(library, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(tasks) == ["ccr", "docstring"]
    printed = capsys.readouterr().out
    for name, collection in tasks.items():
        for part, found in divided(collection, 0).items():
            if found.queries:  # there is one file
                assert read_collection(tmp_path / name, part) == found
        about = json.loads((tmp_path / name / "about.json").read_text())
        assert about["digest"] == digest(collection)
        assert about["digest"] in printed
    assert digest(tasks["ccr"]) != digest(library_tasks(library, 1)["ccr"])


def test_a_folder_without_functions(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no Python file with a function"):
        execute(["retrieval", "data", f"out={tmp_path / 'out'}", f"library={tmp_path}"])


def test_bm25_finds_functions_of_the_standard_library() -> None:
    """A part of it, so that this is quick: far above chance, and not everything."""
    collection = library_tasks(standard_library() / "email", 0)["docstring"]
    index = make_index(collection)
    assert len(collection.queries) > 100
    found, chance = (
        measure(search(scorer, len(collection.queries), index.text_D, 100), index.grades).ndcg_10.mean()
        for scorer in (
            bm25_scorer(list(collection.queries.values()), index.texts),
            random_scorer(len(index.texts), 0),
        )
    )
    assert 0.3 < found < 0.9
    assert chance < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("name", "low", "high"), [("docstring", 0.2, 0.5), ("ccr", 0.4, 0.8)])
def test_tasks_of_the_standard_library_are_neither_trivial_nor_hopeless(name: str, low: float, high: float) -> None:
    """BM25 in a range that holds for any Python, and at its value for the Python whose pairs are known."""
    whole = library_tasks(standard_library(), 0)[name]
    part = divided(whole, 0)["test"]
    index = make_index(part)
    scorers = bm25_scorer(list(part.queries.values()), index.texts), random_scorer(len(index.texts), 0)
    found, chance = (
        measure(search(scorer, len(part.queries), index.text_D, 100), index.grades).ndcg_10.mean() for scorer in scorers
    )
    assert len(whole.queries) > 3000
    assert chance < 0.01
    assert low < found < high
    assert found == pytest.approx(BM25.get(digest(whole), found), abs=0.005)
