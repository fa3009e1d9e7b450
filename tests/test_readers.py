"""Readers: every format gives the same documents, and every defect names its file and line."""

import builtins
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import Table, parquet
from pyarrow import array as arrow_array

from unipool_jax.data.errors import DataError
from unipool_jax.data.readers import PLAIN_TEXT, SUFFIXES, read_texts

TEXTS = ["first\nwith lines", "", "na\u00efve \U0001f469", "x" * 300_000]


def _lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()


def write_documents(path: Path, texts: list[str], field: str = "text") -> Path:
    """Writes `texts` in the format of the file's name (not `.txt`)."""
    lines = _lines(texts, field)
    if path.name.endswith(".parquet"):
        parquet.write_table(Table.from_pydict({field: texts, "n": [1] * len(texts)}), path, row_group_size=2)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.name.endswith(".xz"):
        path.write_bytes(lzma.compress(lines))
    elif path.name.endswith(".zst"):
        half = len(lines) // 2  # two frames, as parallel compressors write
        frames = [zstandard.compress(part) for part in (lines[:half], lines[half:])]
        path.write_bytes(b"".join(frames))
    else:
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix not in PLAIN_TEXT])
@pytest.mark.parametrize("field", ["text", "content"])
def test_formats_give_the_same_documents(tmp_path: Path, suffix: str, field: str) -> None:
    path = write_documents(tmp_path / f"a{suffix}", TEXTS, field)
    assert list(read_texts([path, path], field)) == TEXTS * 2


def test_zstd_frames_with_a_long_window(tmp_path: Path) -> None:
    # `zstd --long=31`, as used for large corpora, asks for more memory than readers allow by default.
    parameters = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)
    path = tmp_path / "a.jsonl.zst"
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(compressor.compress(_lines(TEXTS)) + compressor.flush())
    assert list(read_texts([path])) == TEXTS


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\ntwo \xc3\xa9\n")
    assert list(read_texts([path])) == ["one\r\n\ntwo \u00e9\n"]


def test_missing_final_newline_and_blank_lines_at_the_end_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b"}')
    assert list(read_texts([path])) == ["a", "b"]
    path.write_bytes(b'{"text": "a"}\r\n{"text": "b"}\n\n \n')
    assert list(read_texts([path])) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1: no documents"),
        (b"\n\n", "line 1: no documents"),
        (b'{"text": "a"}\n\n{"text": "b"}\n', "line 2: blank line"),
        (b'{"text": "a"}\n{"text": "b\n', "line 2: not a JSON object"),
        (b'{"text": "a"}\n[1]\n', "line 2: expected a JSON object, found list"),
        (b'{"text": "a"}\n{"body": "b"}\n', "line 2: no field 'text'; it has 'body'"),
        (b'{"text": "a"}\n{"text": 3}\n', "line 2: 'text' is int"),
        (b'{"text": null}\n', "line 1: 'text' is NoneType"),
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2: not UTF-8 .byte 0xe9 at offset 13"),
        (b'{"text": "\\ud83d"}\n', "line 1: character 0 is half of a surrogate pair"),
        (b"[" * 100_000 + b"\n", "line 1: not a JSON object"),
    ],
)
def test_defects_name_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.jsonl, {message}"):
        list(read_texts([path]))


def test_text_file_defects_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(DataError, match=r"bad\.txt, line 2: not UTF-8 .byte 0xff"):
        list(read_texts([path]))
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"bad\.txt, line 1: no documents"):
        list(read_texts([path]))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".parquet"])
def test_cut_off_and_foreign_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = write_documents(tmp_path / f"a{suffix}", [f"document {i} " * 9 for i in range(5000)])
    whole = path.read_bytes()
    for size in (len(whole) - 3, len(whole) // 3):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"a{suffix}, after (line|row) \d+: damaged or truncated"):
            list(read_texts([path]))
    path.write_bytes(b"this is not compressed" * 10)
    with pytest.raises(DataError, match=rf"a{suffix}, after (line|row) 0: damaged or truncated"):
        list(read_texts([path]))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".jsonl.xz"])
def test_a_second_frame_is_read_or_refused(tmp_path: Path, suffix: str) -> None:
    path = write_documents(tmp_path / f"a{suffix}", TEXTS)
    frame = path.read_bytes()
    path.write_bytes(frame * 2)
    assert list(read_texts([path])) == TEXTS * 2
    for damaged in (b"garbage", bytes(2) + frame[2:], frame[:9]):
        path.write_bytes(frame + damaged)
        with pytest.raises(DataError, match="damaged or truncated"):
            list(read_texts([path]))
    path.write_bytes(frame + bytes(20_000) + (frame if suffix.endswith("xz") else b""))
    if suffix.endswith("zst"):  # the other two formats allow padding
        with pytest.raises(DataError, match="damaged or truncated"):
            list(read_texts([path]))
    else:
        assert list(read_texts([path])) == TEXTS * (2 if suffix.endswith("xz") else 1)


def test_parquet_defects(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(Table.from_pydict({"body": ["a"], "n": [1]}), path)
    with pytest.raises(
        DataError, match=r"a\.parquet, row 1: no column 'text'; it has body, n; .* field=NAME of `unipool data`"
    ):
        list(read_texts([path]))
    with pytest.raises(DataError, match=r"column 'n' holds int64, not text"):
        list(read_texts([path], "n"))
    parquet.write_table(Table.from_pydict({"text": ["a", None]}), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: 'text' is NoneType"):
        list(read_texts([path]))
    latin = arrow_array([b"ok", b"caf\xe9"]).view("string")
    parquet.write_table(Table.from_arrays([latin], names=["text"]), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: not UTF-8"):
        list(read_texts([path]))


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
    ],
    ids=str,
)
def test_all_kinds_of_text_columns(tmp_path: Path, kind: pyarrow.DataType) -> None:
    texts, path = ["a", "na\u00efve", "", "a"], tmp_path / "a.parquet"
    parquet.write_table(Table.from_arrays([arrow_array(texts).cast(kind)], names=["text"]), path)
    assert list(read_texts([path])) == texts


@pytest.mark.parametrize(
    "column",
    [
        arrow_array([b"a"]),
        arrow_array([b"a"]).cast(pyarrow.large_binary()),
        arrow_array([b"a"]).dictionary_encode(),
        arrow_array([["a"]]),
        arrow_array([{"a": "b"}]),
        pyarrow.nulls(1),
    ],
    ids=lambda column: str(column.type),
)
def test_columns_that_are_no_text_are_refused(tmp_path: Path, column: pyarrow.Array) -> None:
    parquet.write_table(Table.from_arrays([column], names=["text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'text' holds .*, not text; cast it to string"):
        list(read_texts([tmp_path / "a.parquet"]))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = Table.from_arrays([arrow_array(["a"]), arrow_array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="2 columns are called 'text'"):
        list(read_texts([tmp_path / "a.parquet"]))


MARK = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    text, lines, packed = tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    text.write_bytes(MARK + "caf\u00e9\ufeff".encode())
    lines.write_bytes(MARK + b'{"text": "a"}\n' + MARK + b'{"text": "\\ufeffb"}\n')  # files put together
    packed.write_bytes(gzip.compress(MARK + b'{"text": "c"}\n'))
    assert list(read_texts([text, lines, packed])) == ["caf\u00e9\ufeff", "a", "\ufeffb", "c"]
    text.write_bytes(MARK)
    with pytest.raises(DataError, match="no documents"):
        list(read_texts([text]))


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.xz"])
def test_other_codings_are_named(tmp_path: Path, coding: str, suffix: str) -> None:
    content = json.dumps({"text": "words"}).encode(coding)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(lzma.compress(content) if suffix.endswith("xz") else content)
    with pytest.raises(DataError, match=rf"a{suffix}: is UTF-.*iconv"):
        list(read_texts([path]))


def test_a_line_or_value_has_a_largest_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unipool_jax.data.readers.MAX_DOCUMENT_BYTES", 1 << 20)
    for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".parquet"):
        path = write_documents(tmp_path / f"a{suffix}", ["short", "x" * ((1 << 20) - 100)])
        assert len(list(read_texts([path]))) == 2
        path = write_documents(path, ["short", "x" * ((1 << 20) + 1), "never read"])
        with pytest.raises(DataError, match=rf"a{suffix}, (line|row) 2: longer than 1 MiB"):
            list(read_texts([path]))


@pytest.mark.parametrize(
    "text",
    ["line\n" * 100, "\u00e9" * 100, "x" * 64, "x" * 65, "\U0001f469x" * 40 + "\n"],
    ids=["lines", "two bytes", "just", "more", "four bytes"],
)
def test_long_text_files_are_cut_at_lines_or_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("unipool_jax.data.readers.MAX_DOCUMENT_BYTES", 64)
    (tmp_path / "a.txt").write_bytes(MARK + text.encode())
    parts = list(read_texts([tmp_path / "a.txt"]))
    assert "".join(parts) == text
    assert all(len(part.encode()) <= 64 for part in parts)
    assert len(parts) == -(-len(text.encode()) // 60) or len(text) < 66
    if "\n" in text[:64]:
        assert all(part.endswith("\n") for part in parts)
    (tmp_path / "a.txt").write_bytes(b"line\n" * 100 + b"\xff")
    with pytest.raises(DataError, match=r"a\.txt, line 101: not UTF-8"):
        list(read_texts([tmp_path / "a.txt"]))


@pytest.mark.parametrize(("suffix", "package"), [(".jsonl.zst", "zstandard"), (".parquet", "pyarrow")])
def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, package: str) -> None:
    path = write_documents(tmp_path / f"a{suffix}", TEXTS)
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install unipool_jax\[data\]"):
        list(read_texts([path]))


def test_unknown_suffix_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv: unknown file format"):
        list(read_texts([tmp_path / "a.csv"]))
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot open"):
        list(read_texts([tmp_path / "gone.jsonl"]))
