"""Small files of a run or a store: one reader and one writer, whose errors name file, fault and remedy.

    found = read_json(run / "summary.json", "delete it and repeat the command")
    check_fields(found, run / "summary.json", {"step": int, "results.valid.loss": float}, "...")
    write_json(run / "summary.json", found)

A writer replaces a file atomically: after a crash it holds all of the old content or all of the new. A reader takes
nothing for granted, because disks fill up, copies break off, and people edit files.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import stat
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from unipool_jax.config.errors import UserError

RESTORE = "restore it from a backup, or correct it"
"""What to do about most damaged files."""

_ANOTHER, _ROOM = "choose another place, or change what is there", "make room, or choose another place"
_REMEDIES = {
    errno.EACCES: _ANOTHER,
    errno.EPERM: _ANOTHER,
    errno.EROFS: _ANOTHER,
    errno.ENOTDIR: _ANOTHER,
    errno.EISDIR: _ANOTHER,
    errno.EEXIST: _ANOTHER,
    errno.ENOTEMPTY: _ANOTHER,
    errno.ELOOP: _ANOTHER,
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
}


class FileError(UserError):
    """A file cannot be read, holds something else than it must, or cannot be written."""


def remedy(error: OSError) -> str | None:
    """What to do about an error of the file system; None where it is no fault of a place or a disk."""
    return _REMEDIES.get(error.errno or 0)


def check_name(path: Path) -> None:
    """Raises FileError for a path with bytes that are not UTF-8, which libraries in C++ cannot take."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise FileError(f"{path}: a name that is not UTF-8; rename it, or use a link with another name") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises FileError where the block fails to write `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError(f"{path}: cannot be written: {reason}; {remedy(error) or _ANOTHER}") from error
    except UnicodeEncodeError as error:
        raise FileError(f"{path}: its name is not UTF-8; choose another name") from error


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces the content of `path`, in a folder that is made if needed; see above.

    Raises:
      FileError: it cannot be written; the old content is intact.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8, atomically; raises FileError."""
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Writes a JSON document, atomically; raises FileError."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an array as `.npy`, atomically; raises FileError."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())


def read_bytes(path: Path, advice: str = RESTORE) -> bytes:
    """The content of a file; raises FileError, which ends with `advice`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for its writer
            raise FileError(f"{path}: not a file but a folder, a pipe or a device; {advice}")
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}; {advice}") from error


def read_text(path: Path, advice: str = RESTORE) -> str:
    """UTF-8 text that is not empty; raises FileError."""
    return _decoded(read_bytes(path, advice), str(path), advice)


def _decoded(content: bytes, where: str, advice: str) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FileError(f"{where}: not UTF-8 in line {line} (byte {error.start}); {advice}") from error
    if not text.strip("\x00 \t\r\n"):
        raise FileError(f"{where}: empty; {advice}")
    return text


def read_json(path: Path, advice: str = RESTORE) -> dict[str, Any]:
    """A JSON object; raises FileError."""
    return parse_json(read_bytes(path, advice), str(path), advice)


def read_entries(path: Path, name: str, fields: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The entries of a record that nothing depends on, `{NAME: [...]}`; none where there is no file.

    Args:
      fields: of the document besides, see `check_fields`.

    Raises:
      FileError: the file is damaged.
    """
    advice = "delete it: it is a record that nothing depends on"
    if not path.exists():
        return []
    document = read_json(path, advice)
    check_fields(document, path, {name: list, **(fields or {})}, advice)
    return [entry for entry in document[name] if isinstance(entry, dict)]


def parse_json(content: bytes | str, where: str, advice: str = RESTORE) -> dict[str, Any]:
    """The JSON object in `content`, which comes from `where`; raises FileError."""
    text = _decoded(content, where, advice) if isinstance(content, bytes) else content
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # nested too deeply
        raise FileError(f"{where}: not JSON ({error}); {advice}") from error
    if not isinstance(value, dict):
        raise FileError(f"{where}: expected a JSON object, found {type(value).__name__}; {advice}")
    return value


def read_yaml(path: Path, advice: str = RESTORE) -> dict[str, Any]:
    """The mapping in a YAML file; raises FileError."""
    value = parse_yaml(read_text(path, advice), str(path), advice)
    if not isinstance(value, dict):
        raise FileError(f"{path}: expected settings such as `model:`, found {type(value).__name__}; {advice}")
    return value


def parse_yaml(text: str, where: str, advice: str = RESTORE) -> Any:
    """The value of YAML text, which comes from `where`; raises FileError."""
    try:
        return yaml.safe_load(text)
    except Exception as error:  # a tag over a value that it does not fit raises whatever its constructor meets
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileError(f"{where}: not YAML ({reason}); {advice}") from error


def read_array(path: Path, advice: str = RESTORE) -> np.ndarray:
    """The array in a `.npy` file; raises FileError."""
    content = read_bytes(path, advice)
    try:
        # Not the path: a damaged header would be taken for a pickle or for a size that no file has.
        return np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # the header is a Python literal, and NumPy raises what its parser meets
        raise FileError(f"{path}: not a NumPy array ({error}); {advice}") from error


class Line(NamedTuple):
    """A line of a file of JSON objects."""

    text: bytes
    """With its newline, if it has one."""
    record: dict[str, Any]
    """Empty where there is a problem."""
    problem: FileError | None


def read_lines(path: Path, fields: Mapping[str, Any], advice: str = RESTORE) -> Iterator[Line]:
    """The lines of a file with one JSON object a line; an unreadable last line without newline, whose writer is not
    finished or was killed, is left out.

    Args:
      fields: what every object must have, see `check_fields`.

    Raises:
      FileError: the file cannot be read. What is wrong with a line is its `problem`.
    """
    for number, text in enumerate(read_bytes(path, advice).splitlines(keepends=True), 1):
        where = f"{path} line {number}"
        try:
            record = parse_json(text, where, advice)
            check_fields(record, where, fields, advice)
        except FileError as error:
            if text.endswith(b"\n"):
                yield Line(text, {}, error)
        else:
            yield Line(text, record, None)


_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "an object",
    list: "a list",
    bool: "true or false",
    type(None): "null",
}


def check_fields(document: Any, where: Path | str, fields: Mapping[str, Any], advice: str = RESTORE) -> None:
    """Raises FileError unless a document has fields of these types.

    Args:
      document: from `where`.
      fields: types by dotted name, in which `*` stands for every name, or every entry of a list:
        `{"results": dict, "results.*.bytes": int | None}`. A `float` may be a whole number; only a `bool` is true or
        false. What would be below a null is not asked for.
      advice: what to do about it.
    """
    for field, kind in fields.items():
        kinds = typing.get_args(kind) or (kind,)
        for name, value in _values(document, field.split(".")):
            if value is _MISSING:
                raise FileError(f"{where}: {name} is missing; {advice}")
            if not any(_is(value, each) for each in kinds):
                expected = " or ".join(_KINDS[each] for each in kinds)
                raise FileError(f"{where}: {name} is {value!r:.80}, expected {expected}; {advice}")


_MISSING = object()


def _values(value: Any, parts: list[str], above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a field with their names; `_MISSING` where there is none."""
    if not parts:
        yield above, value
    elif value is not None:
        members = dict(enumerate(value)) if isinstance(value, list) else value if isinstance(value, Mapping) else {}
        for part in members if parts[0] == "*" else parts[:1]:
            yield from _values(members.get(part, _MISSING), parts[1:], f"{above}.{part}" if above else str(part))


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)
