"""Documents from text, JSON-lines and parquet files.

Reading has two stages, so that the slow one can run in other processes: `DocumentFile` yields raw
records in file order, and `document_text` decodes and checks one record. Every error names the file
and the line (or row).
"""

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from unipool_jax.data.errors import DataError

PLAIN_TEXT = (".txt", ".text", ".md", ".markdown", ".rst")
"""Endings of files that are one document each, read as they are."""

SUFFIXES = (*PLAIN_TEXT, ".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".parquet")

MAX_DOCUMENT_BYTES = 1 << 25
"""Of one document, or the line that holds it, which is in memory several times. Longer text files are cut."""

Record = tuple[int, Any]
"""(number of the line or row, from 1; the undecoded line, or the value of the parquet column)."""

_UTF8_MARK = b"\xef\xbb\xbf"
_OTHER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""Byte order marks; UTF-32 first, whose mark starts with that of UTF-16."""


def file_format(path: Path) -> str:
    """Which of `SUFFIXES` the file name ends in; raises DataError if none."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    raise DataError(f"{path}: unknown file format; the name must end in one of {', '.join(SUFFIXES)}")


def is_readable(path: Path) -> bool:
    """Whether the name ends in one of `SUFFIXES`."""
    return path.name.lower().endswith(SUFFIXES)


def unit(path: Path) -> str:
    """What the number of a record counts in this file: `row` or `line`."""
    return "row" if file_format(path) == ".parquet" else "line"


class DocumentFile:
    """Raw records of one file, one per document, in file order.

    A file of `PLAIN_TEXT` is one document; larger than `MAX_DOCUMENT_BYTES` it is several, cut at ends of lines. Use as
    a context manager, and iterate once.

    Raises:
      DataError: while iterating: a damaged or truncated file, no documents, a blank line before the
        last document, a parquet file without a text column `field`.
    """

    def __init__(self, path: Path, field: str):
        self._path = path
        self._field = field
        self._format = file_format(path)
        self._raw: IO[bytes] = io.BytesIO()

    def __enter__(self) -> "DocumentFile":
        try:
            self._raw = self._path.open("rb")
        except OSError as error:
            raise DataError(f"{self._path}: cannot open ({error.strerror})") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._raw.close()

    def position(self) -> int:
        """Bytes of the (compressed) file read so far, for a progress bar."""
        return 0 if self._raw.closed else self._raw.tell()

    def __iter__(self) -> Iterator[Record]:
        number = 0
        try:
            for number, payload in self._records():
                yield number, payload
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, OSError) as error:
            raise DataError(
                f"{self._path}, after {unit(self._path)} {number}: damaged or truncated file ({error})"
            ) from error
        if number == 0:
            raise DataError(f"{self._path}, line 1: no documents in this file")

    def _records(self) -> Iterator[Record]:
        if self._format in PLAIN_TEXT:
            yield from self._texts()
        elif self._format == ".parquet":
            yield from _parquet_records(self._path, self._raw, self._field)
        else:
            yield from self._lines()

    def _texts(self) -> Iterator[Record]:
        number, content = 1, _without_mark(self._path, self._raw.read(MAX_DOCUMENT_BYTES + 1))
        content += self._raw.read(MAX_DOCUMENT_BYTES + 1 - len(content))
        while len(content) > MAX_DOCUMENT_BYTES:
            end = content.rfind(b"\n", 0, MAX_DOCUMENT_BYTES) + 1 or _last_character(content, MAX_DOCUMENT_BYTES)
            yield number, content[:end]
            number += content.count(b"\n", 0, end)
            content = content[end:]
            content += self._raw.read(MAX_DOCUMENT_BYTES + 1 - len(content))
        if content:
            yield number, content

    def _lines(self) -> Iterator[Record]:
        blank = 0
        with _decompressed(self._path, self._raw, self._format) as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_DOCUMENT_BYTES + 1), b""), start=1):
                if len(line) > MAX_DOCUMENT_BYTES:
                    raise _too_long(self._path, number)
                line = _without_mark(self._path, line)
                if not line.strip():
                    blank = blank or number
                    continue
                if blank:
                    raise DataError(f"{self._path}, line {blank}: blank line; expected an object")
                yield number, line


def _without_mark(path: Path, content: bytes) -> bytes:
    """`content` without the byte order mark that some editors write at the head of UTF-8.

    Raises:
      DataError: it is UTF-16 or UTF-32.
    """
    if content.startswith(_UTF8_MARK):
        return content[len(_UTF8_MARK) :]
    coding = next((name for mark, name in _OTHER_MARKS.items() if content.startswith(mark)), None)
    # UTF-16 without a mark is UTF-8 with a zero in every second byte, UTF-32 with three in four.
    head = content[:4096]
    if coding is None and len(head) / 4 < head.count(0) < len(head) * 0.8:
        coding = "UTF-16 or UTF-32"
    if coding is not None:
        raise DataError(f"{path}: is {coding}; convert it to UTF-8: iconv -f UTF-16 -t UTF-8 {path.name}")
    return content


def _last_character(content: bytes, limit: int) -> int:
    """Where the last character of UTF-8 that starts before `limit` starts."""
    return next((end for end in range(limit, limit - 4, -1) if content[end] & 0xC0 != 0x80), limit)


def _too_long(path: Path, number: int) -> DataError:
    return DataError(
        f"{path}, {unit(path)} {number}: longer than {MAX_DOCUMENT_BYTES >> 20} MiB, the most that a document may "
        "have; cut it into several documents"
    )


def _decompressed(path: Path, raw: IO[bytes], suffix: str) -> IO[bytes]:
    if suffix == ".jsonl.gz":
        return gzip.open(raw, "rb")  # type: ignore[return-value]
    if suffix == ".jsonl.xz":
        return io.BufferedReader(_FrameStream(raw, _xz_frame, lzma.LZMAError, padded=True), 1 << 20)
    if suffix == ".jsonl.zst":
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{path}: reading zstd needs the data extra: pip install unipool_jax[data]") from error
        # The format's limit: large corpora are often compressed with `--long`.
        new_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        return io.BufferedReader(_FrameStream(raw, new_frame, zstandard.ZstdError, padded=False), 1 << 20)
    return raw


def _xz_frame() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(memlimit=1 << 31)


class _FrameStream(io.RawIOBase):
    """Decompressed bytes of consecutive frames; EOFError if the last one is incomplete.

    The reader of `zstandard` ends silently inside an incomplete frame, and that of `lzma` before a frame whose head is
    damaged.
    """

    def __init__(self, raw: IO[bytes], new_frame: Callable[[], Any], error: type[Exception], *, padded: bool):
        """`padded`: zeros may follow a frame."""
        self._raw = raw
        self._padded = padded
        self._new_frame = new_frame
        self._error = error
        self._frame: Any = None
        self._compressed = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            # Little at a time: a byte can stand for thirty thousand.
            self._compressed = self._compressed or self._raw.read(1 << 12)
            while self._padded and self._frame is None and self._compressed[:1] == b"\0":
                self._compressed = self._compressed.lstrip(b"\0") or self._raw.read(1 << 12)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the last compressed frame is incomplete")
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._ready = self._frame.decompress(self._compressed)
            except self._error as error:
                raise OSError(str(error)) from error
            self._compressed = b""
            if self._frame.eof:
                self._compressed = self._frame.unused_data
                self._frame = None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


_CHOOSE_FIELD = (
    "name the one that holds the text with field=NAME of `unipool data` (and `unipool tokenizer`), and train on the "
    "store that it builds with data=pile data.stores=[STORE]"
)


def _parquet_records(path: Path, raw: IO[bytes], field: str) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs the data extra: pip install unipool_jax[data]") from error
    row = 0
    try:
        table = parquet.ParquetFile(raw)
        schema = table.schema_arrow
        if field not in schema.names:
            raise DataError(f"{path}, row 1: no column {field!r}; it has {', '.join(schema.names)}; {_CHOOSE_FIELD}")
        if schema.names.count(field) > 1:
            raise DataError(
                f"{path}, row 1: {schema.names.count(field)} columns are called {field!r}; rename all but one"
            )
        kind = schema.field(field).type
        value_kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if value_kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
            raise DataError(f"{path}, row 1: column {field!r} holds {kind}, not text; cast it to string")
        # Few rows at a time, since each may be a long document.
        for batch in table.iter_batches(batch_size=8, columns=[field]):
            for value in batch.column(0):
                row += 1
                text = value.as_py()
                if text is not None and len(text) > MAX_DOCUMENT_BYTES:
                    raise _too_long(path, row)
                yield row, text
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, row {row}: not UTF-8 ({error})") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}, after row {row}: damaged or truncated file ({error})") from error


def document_text(path: Path, record: Record, field: str) -> str:
    """The text of one record of `path`.

    Raises:
      DataError: not UTF-8, not a JSON object, no `field`, or a `field` that is not text.
    """
    number, payload = record
    place = f"{path}, {unit(path)} {number}"
    if isinstance(payload, bytes):
        try:
            text = payload.decode()
        except UnicodeDecodeError as error:
            if file_format(path) in PLAIN_TEXT:
                line = payload.count(b"\n", 0, error.start) + number
                place = f"{path}, line {line}"
            raise DataError(f"{place}: not UTF-8 (byte 0x{payload[error.start]:02x} at offset {error.start})") from None
        payload = text if file_format(path) in PLAIN_TEXT else _json_field(place, text, field)
    if not isinstance(payload, str):
        raise DataError(f"{place}: {field!r} is {type(payload).__name__}, expected text")
    try:
        payload.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: character {error.start} is half of a surrogate pair, not Unicode text") from None
    return payload


def _json_field(place: str, line: str, field: str) -> Any:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not a JSON object ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected a JSON object, found {type(value).__name__}")
    if field not in value:
        names = ", ".join(map(repr, list(value)[:8])) or "no fields"
        raise DataError(f"{place}: no field {field!r}; it has {names}; {_CHOOSE_FIELD}")
    return value[field]


def read_texts(paths: Iterable[Path], field: str = "text") -> Iterator[str]:
    """The text of every document of `paths`, in order, empty documents included.

    Raises:
      DataError: as `DocumentFile` and `document_text`.
    """
    for path in paths:
        with DocumentFile(path, field) as documents:
            for record in documents:
                yield document_text(path, record, field)
