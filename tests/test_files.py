"""Small files: every kind of damage is a sentence that names the file and what to do, and writing loses nothing."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unipool_jax
from unipool_jax.config.errors import UserError
from unipool_jax.config.files import (
    FileError,
    check_fields,
    read_array,
    read_entries,
    read_json,
    read_lines,
    read_text,
    read_yaml,
    write_array,
    write_atomically,
    write_json,
    write_text,
)

ADVICE = "delete it and start again"
READERS: list[Callable[..., Any]] = [read_text, read_json, read_yaml, read_array]


def _no_file(path: Path) -> None:
    path.unlink(missing_ok=True)


def _folder(path: Path) -> None:
    path.mkdir()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("make", [_no_file, _folder, _pipe, _loop])
def test_what_is_no_file_is_said(tmp_path: Path, read: Callable[..., Any], make: Callable[[Path], None]) -> None:
    make(tmp_path / "file")
    with pytest.raises(FileError, match=rf"/file: .*; {ADVICE}$"):
        read(tmp_path / "file", ADVICE)


_DEEP = 100_000


@pytest.mark.parametrize(
    ("read", "content", "problem"),
    [
        (read_text, b"", "empty"),
        (read_text, b"\0" * 4096, "empty"),
        (read_text, b"model:\n  name: caf\xe9\n", r"not UTF-8 in line 2 \(byte 18\)"),
        (read_json, b"", "empty"),
        (read_json, b"{", "not JSON"),
        (read_json, b'{"step": \xff}', "not UTF-8"),
        (read_json, b"[" * _DEEP, "not JSON"),
        (read_json, b'{"step": ' + b"9" * 5000 + b"}", "not JSON"),
        (read_json, b"[1, 2]", "expected a JSON object, found list"),
        (read_yaml, b"", "empty"),
        (read_yaml, b"a: [", "not YAML"),
        (read_yaml, b"a: " + b"[" * _DEEP, "not YAML"),
        (read_yaml, b"a: !!timestamp x", "not YAML"),
        (read_yaml, b"a: !!int ''", "not YAML"),
        (read_yaml, b"a: 2026-13-45", "not YAML"),
        (read_yaml, b"? {a: 1}\n: 2", "not YAML"),
        (read_yaml, b"a: \x07", "not YAML"),
        (read_yaml, b"- a\n", "expected settings such as `model:`, found list"),
        (read_array, b"", "not a NumPy array"),
        (read_array, b"\x93NUMPY\x01\x00\x46\x00{'descr': '<i8', 'shape': (99999999999,)", "not a NumPy array"),
    ],
)
def test_damaged_content_is_said(tmp_path: Path, read: Callable[..., Any], content: bytes, problem: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(FileError, match=rf"/file: {problem}.*; {ADVICE}$"):
        read(path, ADVICE)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"x": [1.5, None, "é"]})
    assert read_json(tmp_path / "new" / "a.json") == {"x": [1.5, None, "é"]}
    write_text(tmp_path / "a.yaml", "name: é\n")
    assert read_yaml(tmp_path / "a.yaml") == {"name": "é"}
    array = np.arange(6).reshape(2, 3)
    write_array(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(read_array(tmp_path / "a.npy"), array)
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a.npy").stat().st_mode & 0o777 == 0o666 & ~mask


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
    """Files larger than 16 bytes fail to be written; so would the report of this test if it went to a file."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_keeps_the_old_content(tmp_path: Path) -> None:
    with _full_disk():
        write_atomically(tmp_path / "file", b"old")
        with pytest.raises(FileError, match=r"/file: cannot be written: .*; make room"):
            write_atomically(tmp_path / "file", b"new" * 100)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_places_that_cannot_be_written_are_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below", tmp_path / "folder", tmp_path / ("x" * 300)):
        with pytest.raises(FileError, match=r"cannot be written: .*; choose"):
            write_atomically(path, b"text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_names_that_are_not_utf8_can_be_printed(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(FileError, match=r"caf\\udce9") as error:
        read_text(path)
    str(error.value).encode()
    assert str(UserError(str(path))).encode()


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({}, "step is missing"),
        ({"step": "3"}, "step is '3', expected a whole number"),
        ({"step": True}, "step is True, expected a whole number"),
        ({"step": 1, "results": {}}, "results.valid.loss is missing"),
        ({"step": 1, "results": {"valid": 3}}, "results.valid.loss is missing"),
        ({"step": 1, "results": {"valid": {"loss": [], "bytes": 1}}}, r"results.valid.loss is \[\], expected a number"),
        ({"step": 1, "results": {"valid": {"loss": 1, "bytes": ""}}}, "bytes is '', expected a whole number or null"),
        ({"step": 1, "results": {"valid": {"loss": 1, "bytes": None}, "test": {}}}, "results.test.bytes is missing"),
    ],
)
def test_fields_are_checked(document: dict[str, Any], problem: str) -> None:
    fields = {"step": int, "results.valid.loss": float, "results.*.bytes": int | None}
    check_fields({"step": 3, "results": {"valid": {"loss": 1, "bytes": None}}, "more": 1}, "a.json", fields)
    with pytest.raises(FileError, match=rf"^a\.json: .*{problem}.*; {ADVICE}$"):
        check_fields(document, "a.json", fields, ADVICE)


def test_lines_have_their_own_problems(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"step": 1}\n{"step": []}\n\xff\n\n{"step": 2}\n{"st')
    found = list(read_lines(path, {"step": int}, ADVICE))
    assert [line.record for line in found if line.problem is None] == [{"step": 1}, {"step": 2}]
    assert [re.sub(".*/", "", str(line.problem)).split(":")[0] for line in found if line.problem] == [
        "lines line 2",
        "lines line 3",
        "lines line 4",
    ]


# Not small files of a run or a store: a table and texts of the package, a compiler's dump, an array of any size, what
# the kernel says of devices.
_OTHERS = {
    *("kernels/tpu_tiles.py", "cli/help.py", "config/version.py", "planner/compilation.py", "data/store_writer.py"),
    "parallel/accelerators.py",
}


def test_there_is_one_reader_and_one_writer() -> None:
    pattern = r"\.read_text\(|\.write_text\(|\.write_bytes\(|json\.load\(|json\.dump\(|yaml\.safe_load|np\.save\("
    package = Path(unipool_jax.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(pattern, path.read_text(encoding="utf-8"))
    }
    assert found - _OTHERS == {"config/files.py"}


def test_every_entry_of_a_list_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert read_entries(path, "events", {"events.*.step": int}) == []
    write_json(path, {"events": [{"step": 1}, {"step": 2}]})
    assert read_entries(path, "events", {"events.*.step": int}) == [{"step": 1}, {"step": 2}]
    write_json(path, {"events": [{"step": 1}, {"step": "2"}]})
    with pytest.raises(FileError, match=r"record\.json: events\.1\.step is '2', expected a whole number; delete it"):
        read_entries(path, "events", {"events.*.step": int})
