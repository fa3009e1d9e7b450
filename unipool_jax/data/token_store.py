"""Builds token stores from text files; opens them (see `opening`).

store = build_store(["pile/00.jsonl.zst"], "stores/00", "gpt2")
store.read(0, 1025)
"""

import contextlib
import itertools
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, get_context, resource_tracker
from pathlib import Path
from typing import Any

import numpy as np

from unipool_jax.config.files import FileError, write_atomically
from unipool_jax.data import store_format
from unipool_jax.data.assets import demo_corpus_path
from unipool_jax.data.errors import DataError
from unipool_jax.data.hashing import REMEMBERED, remembered_sha256
from unipool_jax.data.losses import Losses, check_not_empty, measure
from unipool_jax.data.opening import open_store
from unipool_jax.data.pieces import RULE, Cut, cut_records
from unipool_jax.data.readers import DocumentFile, Record, document_text, file_format, unit
from unipool_jax.data.splits import PILE_SPLIT, check_split
from unipool_jax.data.store_reader import TokenStore, building_folder
from unipool_jax.data.store_writer import Encoded, StoreWriter, cannot_write, publish
from unipool_jax.data.tokenizer import (
    ENCODING,
    SlowTokenizerError,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
    parse_tokenizer,
)

__all__ = ["TokenStore", "build_store", "cached_store", "demo_corpus_path", "open_store"]

# Undecoded bytes, and records, that an encoder gets at a time.
_BATCH_BYTES = 1 << 21
_BATCH_RECORDS = 4096

_Numbers = tuple[np.ndarray, np.ndarray, Losses, np.ndarray]


def _encode(tokenizer: Tokenizer, path: Path, field: str, records: list[Record]) -> _Numbers:
    """(lengths, text bytes, losses, tokens) of consecutive records; see `Encoded`."""
    texts = [document_text(path, record, field) for record in records]
    eod = np.array([tokenizer.eod], np.int32)
    pieces: list[np.ndarray] = []
    lengths = np.zeros(len(texts), np.int64)
    rows = _token_rows(tokenizer, path, records, texts)
    for index, ids in enumerate(rows):
        if len(ids):
            pieces += [ids, eod]
            lengths[index] = len(ids) + 1
    tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    dtype = store_format.token_dtype(tokenizer.vocab_size)
    text_bytes = np.array([len(text.encode()) for text in texts], np.int64)
    return lengths, text_bytes, measure(tokenizer, texts, rows), tokens.astype(dtype)


def _token_rows(tokenizer: Tokenizer, path: Path, records: list[Record], texts: list[str]) -> list[np.ndarray]:
    """The ids of each text; errors name the file and the line of the text that cannot be encoded."""
    kind = unit(path)
    try:
        rows = tokenizer.encode_batch(texts)
    except SlowTokenizerError as error:  # trying again, one by one, would take as long
        raise DataError(f"{path}, {kind}s {records[0][0]} to {records[-1][0]}: {error}") from error
    except TokenizerError:
        rows = []
        for (number, _), text in zip(records, texts, strict=True):
            try:
                rows += tokenizer.encode_batch([text])
            except TokenizerError as error:
                raise DataError(f"{path}, {kind} {number}: {error}") from error
    for (number, _), text, row in zip(records, texts, rows, strict=True):
        if not len(row):
            check_not_empty(tokenizer, text, f"{path}, {kind} {number}")
    return rows


class _WorkerDiedError(Exception):
    """A worker process died before it returned a result."""


class _Here:
    """Encodes in this process."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def start(self, path: Path, field: str, records: list[Record]) -> None:
        self._numbers = _encode(self._tokenizer, path, field, records)

    def result(self) -> _Numbers:
        return self._numbers


class _Worker:
    """A process that encodes one batch at a time.

    Each has its own pipe, whose other end is closed here when the process starts: if the process is killed, even while
    it sends a result, reading ends with EOFError. A shared queue, as in `concurrent.futures`, would wait forever.
    """

    def __init__(self, tokenizer: Tokenizer):
        # Spawned, because a fork would copy the locks of this process's threads (TensorStore, maybe
        # JAX) in an unknown state.
        context = get_context("spawn")
        self.pipe, other = context.Pipe()
        arguments = (other, tokenizer.name, tokenizer.definition)
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        other.close()

    def start(self, path: Path, field: str, records: list[Record]) -> None:
        try:
            self.pipe.send((path, field, records))
        except OSError as error:
            raise _WorkerDiedError from error

    def result(self) -> _Numbers:
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise _WorkerDiedError from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def _work(pipe: connection.Connection, name: str, definition: bytes | None) -> None:
    """Encodes batches until the other end of the pipe is closed or its process is gone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(name) if definition is None else parse_tokenizer(name, definition)
    with contextlib.suppress(EOFError, OSError):
        while True:
            path, field, records = pipe.recv()
            try:
                answer: _Numbers | Exception = _encode(tokenizer, path, field, records)
            except Exception as error:  # raised in the parent process
                answer = error
            pipe.send(answer)


@contextlib.contextmanager
def _encoders(tokenizer: Tokenizer, workers: int) -> Iterator[Sequence[_Here | _Worker]]:
    """Encoders of records: this process for `workers=1`, else that many processes."""
    if workers == 1:
        yield [_Here(tokenizer)]
        return
    resource_tracker.ensure_running()  # otherwise starting the first process starts it and resets the mask
    # Workers inherit the signal mask, so that Ctrl-C reaches only this process, even while they import.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    started: list[_Worker] = []
    try:
        try:
            for _ in range(workers):
                started.append(_Worker(tokenizer))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield started
    finally:
        for worker in started:
            worker.pipe.close()
        for worker in started:
            worker.process.join()


def _batches(
    files: Sequence[Path], field: str, cut: Cut | None, start: tuple[int, int], report: Callable[[int], None]
) -> Iterator[tuple[int, int, list[Record]]]:
    """(file index, index of its first record, records) from record `start` on.

    `report` is called with the bytes of input read so far.
    """
    first_file, skip = start
    before = sum(path.stat().st_size for path in files[:first_file])
    for index in range(first_file, len(files)):
        with DocumentFile(files[index], field) as documents:
            batch: list[Record] = []
            size = first = 0
            records = documents if cut is None else cut_records(files[index], iter(documents), field, cut)
            for count, record in enumerate(records):
                if count < skip:
                    first = count + 1
                    continue
                batch.append(record)
                size += len(record[1]) if isinstance(record[1], bytes | str) else 0
                if size >= _BATCH_BYTES or len(batch) == _BATCH_RECORDS:
                    report(before + documents.position())
                    yield index, first, batch
                    first += len(batch)
                    batch, size = [], 0
            if batch:
                yield index, first, batch
        skip = 0
        before += files[index].stat().st_size
        report(before)


def _append_all(
    writer: StoreWriter,
    files: Sequence[Path],
    field: str,
    cut: Cut | None,
    tokenizer: Tokenizer,
    workers: int,
    report: Callable[[int, int], None],
) -> None:
    """Encodes the records that the writer does not have yet, and appends them in input order."""
    waiting: deque[tuple[int, int, _Here | _Worker]] = deque()

    def append_oldest() -> None:
        file, first, encoder = waiting.popleft()
        writer.append(Encoded(file, first, *encoder.result()))

    def report_bytes(position: int) -> None:
        report(position, writer.num_tokens)

    with _encoders(tokenizer, workers) as encoders:
        batches = _batches(files, field, cut, writer.next_record, report_bytes)
        for (file, first, records), encoder in zip(batches, itertools.cycle(encoders), strict=False):
            if len(waiting) == len(encoders):
                append_oldest()  # encoders take turns, so the oldest result is this encoder's
            encoder.start(files[file], field, records)
            waiting.append((file, first, encoder))
        while waiting:
            append_oldest()


@contextlib.contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A function of (bytes read, tokens so far) that updates a progress bar on stderr."""
    if not shown:
        yield lambda position, tokens: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("tokenizing"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[tokens]:,} tokens"),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, tokens=0)
        yield lambda position, tokens: bar.update(task, completed=position, tokens=tokens)


def build_store(
    files: Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Tokenizer,
    split: Sequence[float] = PILE_SPLIT,
    split_order: str = "contiguous",
    *,
    field: str = "text",
    workers: int = 1,
    progress: bool = True,
    shard_tokens: int = store_format.SHARD_TOKENS,
    input_hashes: Sequence[str] | None = None,
    cut: Cut | None = None,
    notes: Sequence[str | None] = (),
) -> TokenStore:
    """Tokenizes `files`, in order, into the store `out`; each document ends with one end-of-document token.

    The store is built in `OUT.building` and renamed when complete, so `out` is never incomplete. An
    interrupted build resumes after its last finished shard when it is repeated. An `out` that was
    built from the same inputs and settings is opened.

    Args:
      split: relative sizes of train, valid and test, in documents.
      split_order: `contiguous` or `interleaved`; see `splits.split_documents`.
      field: JSON field or parquet column that holds the text.
      workers: processes that parse and tokenize; 1 uses this process and the threads of the
        tokenizers package.
      progress: show a progress bar on stderr.
      shard_tokens: tokens per shard file, the most that an interruption can lose.
      input_hashes: content hashes that identify the inputs; default: size and modification time.
      cut: how to cut the texts into documents; None keeps them.
      notes: sentences about the inputs, printed to stderr when the store is built and not when it is opened.

    Raises:
      DataError: bad input (names file and line), no text, an invalid setting, an `out` that holds
        something else, or a full disk.
    """
    if workers < 1 or shard_tokens < 1 or shard_tokens % store_format.CHUNK_TOKENS:
        raise DataError(
            f"workers={workers} shard_tokens={shard_tokens}: workers must be at least 1 and shard_tokens "
            f"a positive multiple of {store_format.CHUNK_TOKENS}"
        )
    paths, out = [Path(file) for file in files], Path(out).resolve()
    if not out.name:
        raise DataError(f"{out}: cannot be a store; choose a folder below it")
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    checked = check_split(split, split_order)
    if not paths:
        raise DataError("no input files")
    for path in paths:
        file_format(path)
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    stats = [path.stat() for path in paths]
    identity = {
        "version": store_format.VERSION,
        "tokenizer": tokenizer.sha256,
        "field": field,
        "shard_tokens": shard_tokens,
        "inputs": list(input_hashes or [f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats]),
        **_cut_identity(cut),
    }
    manifest: dict[str, Any] = {
        "tokenizer": {
            "name": tokenizer.name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
        },
        "field": field,
        "split": list(checked),
        "split_order": split_order,
        "inputs": [{"name": path.name, "bytes": stat.st_size} for path, stat in zip(paths, stats, strict=True)],
        **_cut_identity(cut),
    }
    for entry, digest in zip(manifest["inputs"], input_hashes or (), strict=False):
        entry["sha256"] = digest
    key = store_format.json_sha256(identity)
    folder = building_folder(out)
    if (out / store_format.MANIFEST).is_file():  # finished; must also open in a read-only folder
        return _open_same(out, tokenizer, key, checked, split_order)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with store_format.exclusive_lock(out.with_name(out.name + ".lock")):
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                return _open_same(out, tokenizer, key, checked, split_order)
            if not (folder / store_format.MANIFEST).is_file():
                total = sum(stat.st_size for stat in stats)
                dtype = store_format.token_dtype(tokenizer.vocab_size)
                writer = StoreWriter(folder, key, len(paths), dtype, shard_tokens)
                if tokenizer.definition is not None:
                    write_atomically(folder / store_format.TOKENIZER, tokenizer.definition)
                for note in (*notes, None if cut is None else cut.note()):
                    if note is not None:
                        print(note, file=sys.stderr)
                with _progress(total, progress) as report:
                    _append_all(writer, paths, field, cut, tokenizer, workers, report)
                writer.finish(manifest)
            publish(folder, out)
    except _WorkerDiedError as error:
        raise DataError(
            f"{folder}: a worker process died, perhaps out of memory; repeat the command with fewer than "
            f"{workers} workers to resume after the last finished shard"
        ) from error
    except (OSError, FileError) as error:
        raise cannot_write(folder, error) from error
    return _open_same(out, tokenizer, key, checked, split_order)


def _cut_identity(cut: Cut | None) -> dict[str, Any]:
    """What a cut adds to the identity of a store; nothing without one."""
    return {} if cut is None else {"cut": {"rule": RULE, "characters": cut.size}}


def _open_same(out: Path, tokenizer: Tokenizer, key: str, split: Sequence[float], split_order: str) -> TokenStore:
    """Opens the existing `out` if it is what the present command would build."""
    if (out / store_format.MANIFEST).is_file():
        store = open_store(out, tokenizer, split, split_order)
        if store.manifest["build_key"] == key:
            return store
    raise DataError(
        f"{out}: exists and was not built from these inputs and settings; choose another folder or delete it"
    )


def cached_store(
    files: Sequence[str | Path],
    cache_dir: str | Path,
    tokenizer: str | Tokenizer,
    split: Sequence[float] = PILE_SPLIT,
    split_order: str = "contiguous",
    *,
    field: str = "text",
    workers: int = 1,
    progress: bool = False,
    cut: Cut | None = None,
    notes: Sequence[str | None] = (),
) -> TokenStore:
    """The store of `files`, built in `cache_dir` on first use.

    The folder's name is a hash of the files' contents, the tokenizer and the split, so a changed
    file gives another store and a moved one does not. Concurrent processes build it only once.

    Raises:
      DataError: as `build_store`.
    """
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    checked = check_split(split, split_order)
    try:
        hashes = [remembered_sha256(Path(file), Path(cache_dir) / REMEMBERED) for file in files]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot open ({error.strerror})") from error
    parts = [store_format.VERSION, hashes, tokenizer.sha256, field, checked, split_order]
    if tokenizer.definition is not None:
        parts.append(ENCODING)
    key = store_format.json_sha256([*parts, *_cut_identity(cut).items()])
    store = build_store(
        files,
        Path(cache_dir) / key[:24],
        tokenizer,
        checked,
        split_order,
        field=field,
        workers=workers,
        progress=progress,
        input_hashes=hashes,
        cut=cut,
        notes=notes,
    )
    store.memory = Path(cache_dir) / REMEMBERED
    return store
