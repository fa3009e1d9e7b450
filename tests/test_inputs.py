"""Own text as people have it: a folder, a pattern, Markdown, one single book."""

from __future__ import annotations

from pathlib import Path

import pytest

from unipool_jax.cli.main import main
from unipool_jax.config.compose import compose_config
from unipool_jax.config.paths import expanded, named_files
from unipool_jax.config.rules import validate
from unipool_jax.data.corpus import open_corpus, open_texts
from unipool_jax.data.errors import DataError
from unipool_jax.data.inputs import find_inputs
from unipool_jax.data.pieces import MIN_DOCUMENTS, Cut, pieces, plan_cut
from unipool_jax.data.readers import PLAIN_TEXT, read_texts
from unipool_jax.data.token_store import build_store, cached_store, open_store


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in ("b.md", "a.txt", "deep/c.rst", ".hidden.txt", ".git/d.txt", "[1].text", "picture.png"):
        (folder / name).write_text(f"This is {name}.")
    return folder


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("", ["[1].text", "a.txt", "b.md", "deep/c.rst"]),
        ("*", ["[1].text", "a.txt", "b.md", "deep/c.rst"]),
        ("*.md", ["b.md"]),
        ("**/*.rst", ["deep/c.rst"]),
        ("[ab].*", ["a.txt", "b.md"]),
        ("[1].text", ["[1].text"]),
        (".hidden.txt", [".hidden.txt"]),
    ],
)
def test_a_word_names_files(texts: Path, word: str, names: list[str]) -> None:
    found = find_inputs([str(texts / word)])
    assert [str(path.relative_to(texts)) for path in found.files] == names
    picture = found.note()
    assert (picture is not None and "picture.png" in picture) == (word in ("", "*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["picture.png"], r"picture\.png: unknown file format; the name must end in one of \.txt, \.text, \.md"),
        (["*.png"], r"\*\.png: 1 files, but none with text whose name ends in one of \.txt"),
        (["*.csv"], "no pattern that matches one"),
        (["nothing"], "nothing: unknown file format"),
        (["nothing.txt"], r"nothing\.txt: no such file"),
        (["", "a.txt"], r"a\.txt \(of .*\): the same file as .*a\.txt \(of .*texts\); name it once"),
        (["a.txt", "deep/../a.txt"], "name it once"),
    ],
)
def test_what_names_no_text_is_refused(texts: Path, words: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_inputs([str(texts / word) for word in words])


def test_folders_are_read_through_links_and_without_empty_files(texts: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "e.txt").write_text("e")
    (texts / "link").symlink_to(outside)
    (outside / "round").symlink_to(texts)
    (texts / "nothing.md").touch()
    found = find_inputs([str(texts)])
    assert [path.name for path in found.files] == ["[1].text", "a.txt", "b.md", "c.rst", "e.txt"]
    assert [path.name for path in found.empty] == ["nothing.md"]
    assert "empty: " in (found.note() or "")
    (texts / "link2.txt").symlink_to(texts / "a.txt")
    with pytest.raises(DataError, match="the same file as"):
        find_inputs([str(texts)])


def test_folders_and_patterns_are_settings_of_a_run(texts: Path) -> None:
    validate(compose_config(["data=text", f"data.files=[{texts},{texts}/*.md]"]))


@pytest.mark.parametrize("ending", PLAIN_TEXT)
def test_plain_text_is_one_document_a_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_text("# one\n\ntwo\n")
    assert list(read_texts([path])) == ["# one\n\ntwo\n"]


BOOK = "\n\n".join(" ".join(f"word{paragraph * 7 + n}" for n in range(30)) for paragraph in range(60))


@pytest.mark.parametrize("text", [BOOK, BOOK.replace("\n\n", "\r\n \r\n"), BOOK.replace("\n\n", " "), "x" * 9000, "ab"])
@pytest.mark.parametrize("size", [1, 100, 1000])
def test_pieces_lose_nothing_and_have_their_size(text: str, size: int) -> None:
    found = list(pieces(text, size))
    assert "".join(found) == text
    assert all(size <= len(piece) <= 2 * size for piece in found[:-1])
    assert len(found[-1]) <= 2 * size


def test_pieces_end_with_paragraphs_lines_or_words() -> None:
    assert all(piece.endswith("\n\n") for piece in list(pieces(BOOK, 400))[:-1])
    assert all(piece.endswith("\n") for piece in list(pieces(BOOK.replace("\n\n", "\n"), 400))[:-1])
    assert all(piece.endswith(" ") for piece in list(pieces(BOOK.replace("\n\n", " "), 400))[:-1])


def write(folder: Path, count: int, ending: str = ".txt") -> list[Path]:
    """`count` files of equal length."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{n:03}{ending}" for n in range(count)]
    for path in paths:
        path.write_text(BOOK[:400])
    return paths


@pytest.mark.parametrize(
    ("documents", "split", "order", "is_cut"),
    [
        (1, (18, 1, 1), "interleaved", True),
        (MIN_DOCUMENTS - 1, (18, 1, 1), "interleaved", True),  # test would be empty
        (MIN_DOCUMENTS, (18, 1, 1), "interleaved", False),
        (10, (8, 1, 1), "contiguous", False),  # few, but each split has one
        (10, (1, 0, 0), "contiguous", False),
        (1, (0, 0, 1), "contiguous", False),
        (10, (969, 30, 1), "contiguous", True),
        (40, (969, 30, 1), "contiguous", False),  # nothing for test, as ever
        (30, (40, 1, 0), "interleaved", True),  # nothing for valid
    ],
)
def test_too_few_documents_for_the_splits_are_cut(
    tmp_path: Path, documents: int, split: tuple[int, ...], order: str, is_cut: bool
) -> None:
    assert order in ("interleaved", "contiguous")
    cut = plan_cut(write(tmp_path / "t", documents), split, "interleaved" if order == "interleaved" else "contiguous")
    assert (cut is not None) == is_cut
    assert cut is None or cut.documents == documents


def test_one_book_has_all_splits_and_is_announced_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = tmp_path / "book.md"
    book.write_text(BOOK)
    words = ["data=text", f"data.files=[{book}]", "data.tokenizer=bytes", f"data.cache_dir={tmp_path / 'cache'}"]
    data = compose_config(words).data
    corpus = open_corpus(data, 257)
    said = capsys.readouterr().err
    assert "1 document is too few for the splits: cut into pieces of" in said
    assert corpus.splits() == ["train", "valid", "test"]
    (store,) = corpus.stores
    assert bytes(store.read(0, store.num_tokens).astype("uint8")[:40]) == BOOK[:40].encode()
    assert store.num_tokens == len(BOOK.encode()) + store.num_documents  # nothing lost, one end a piece

    assert open_corpus(data, 257).stores[0].path == store.path
    assert "too few" not in capsys.readouterr().err
    # Text that is evaluated whole stays whole, in a store of its own.
    whole = open_texts(data, [str(book)], 257).stores[0]
    assert (whole.num_documents, whole.path == store.path) == (1, False)


def test_a_cut_is_part_of_the_identity_of_a_store(tmp_path: Path) -> None:
    (book,) = write(tmp_path / "t", 1)
    cuts = [None, Cut(50, 1), Cut(60, 1)]
    stores = [cached_store([book], tmp_path / "cache", "bytes", (1, 0, 0), cut=cut) for cut in cuts]
    assert len({store.path for store in stores}) == 3
    assert [store.manifest.get("cut") for store in stores] == [
        None,
        {"rule": 1, "characters": 50},
        {"rule": 1, "characters": 60},
    ]
    build_store([book], tmp_path / "s", "bytes", (1, 0, 0), progress=False)
    with pytest.raises(DataError, match="was not built from these inputs and settings"):
        build_store([book], tmp_path / "s", "bytes", (1, 0, 0), progress=False, cut=cuts[1])


def test_the_data_command_takes_a_folder_and_cuts_a_book(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "t", 2, ".md")
    (tmp_path / "t" / "cover.jpg").write_bytes(b"\xff")
    command = ["data", str(tmp_path / "t"), f"out={tmp_path / 's'}", "tokenizer=bytes", "workers=1", "progress=false"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "cover.jpg" in printed.err
    assert "2 documents are too few for the splits" in printed.err
    assert open_store(tmp_path / "s").num_documents >= MIN_DOCUMENTS
    assert main(command) == 0  # the same store again
    assert capsys.readouterr().err == ""


def test_a_home_folder_of_nobody_is_no_folder() -> None:
    assert expanded("~").is_absolute()
    assert expanded("~nobody-of-this-name/book.txt") == Path("~nobody-of-this-name/book.txt")
    assert named_files("~nobody-of-this-name/book.txt") == []
