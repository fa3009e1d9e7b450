"""Builds token stores from files of text; opens them (see `opening`).

store = build_store(["pile/00.jsonl.zst"], "stores/00", "gpt2")
store.read(0, 1025)
"""

import contextlib
import itertools
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, get_context, resource_tracker
from pathlib import Path
from typing import Any

import numpy as np

from unipool_jax.data import store_format
from unipool_jax.data.assets import demo_corpus_path
from unipool_jax.data.errors import DataError
from unipool_jax.data.opening import open_store
from unipool_jax.data.readers import DocumentFile, Record, document_text, file_format
from unipool_jax.data.splits import PILE_SPLIT, check_split
from unipool_jax.data.store_reader import TokenStore, building_folder
from unipool_jax.data.store_writer import Encoded, StoreWriter, cannot_write, publish
from unipool_jax.data.tokenizer import Tokenizer, load_tokenizer, parse_tokenizer

__all__ = ["TokenStore", "build_store", "cached_store", "demo_corpus_path", "open_store"]

# Work handed to one encoder at a time: about this many bytes of undecoded records.
_BATCH_BYTES = 1 << 21
_BATCH_RECORDS = 4096

_Numbers = tuple[np.ndarray, np.ndarray, np.ndarray]


def _encode(tokenizer: Tokenizer, path: Path, field: str, records: list[Record]) -> _Numbers:
    """(lengths, text bytes, tokens) of consecutive records; see `Encoded`."""
    texts = [document_text(path, record, field) for record in records]
    eod = np.array([tokenizer.eod], np.int32)
    pieces: list[np.ndarray] = []
    lengths = np.zeros(len(texts), np.int64)
    for index, ids in enumerate(tokenizer.encode_batch(texts)):
        if len(ids):
            pieces += [ids, eod]
            lengths[index] = len(ids) + 1
    tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    dtype = store_format.token_dtype(tokenizer.vocab_size)
    text_bytes = np.array([len(text.encode()) for text in texts], np.int64)
    return lengths, text_bytes, tokens.astype(dtype)


class _WorkerDiedError(Exception):
    """A worker process ended before it answered."""


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

    Each has a pipe of its own, closed on this side when it starts: if the process is killed, even in the middle of an
    answer, reading ends with EOFError. A shared queue, as in `concurrent.futures`, would wait for ever.
    """

    def __init__(self, tokenizer: Tokenizer):
        # Spawned, not forked: this process has threads (TensorStore, maybe JAX) whose locks a fork
        # would copy in an unknown state.
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
    """Answer requests until the other side, or the process there, is gone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(name) if definition is None else parse_tokenizer(name, definition)
    with contextlib.suppress(EOFError, OSError):
        while True:
            path, field, records = pipe.recv()
            try:
                answer: _Numbers | Exception = _encode(tokenizer, path, field, records)
            except Exception as error:  # whatever it is, it belongs to the process that asked
                answer = error
            pipe.send(answer)


@contextlib.contextmanager
def _encoders(tokenizer: Tokenizer, workers: int) -> Iterator[Sequence[_Here | _Worker]]:
    """What encodes records: this process, or `workers` others."""
    if workers == 1:
        yield [_Here(tokenizer)]
        return
    resource_tracker.ensure_running()  # would be started by the first process and reset the mask
    # Processes inherit the signal mask: Ctrl-C reaches this process only, even while they are still importing.
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
    files: Sequence[Path], field: str, start: tuple[int, int], report: Callable[[int], None]
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
            for count, record in enumerate(documents):
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
    tokenizer: Tokenizer,
    workers: int,
    report: Callable[[int, int], None],
) -> None:
    """Encodes everything the writer does not have yet, appending in input order."""
    waiting: deque[tuple[int, int, _Here | _Worker]] = deque()

    def append_oldest() -> None:
        file, first, encoder = waiting.popleft()
        writer.append(Encoded(file, first, *encoder.result()))

    def report_bytes(position: int) -> None:
        report(position, writer.num_tokens)

    with _encoders(tokenizer, workers) as encoders:
        batches = _batches(files, field, writer.next_record, report_bytes)
        for (file, first, records), encoder in zip(batches, itertools.cycle(encoders), strict=False):
            if len(waiting) == len(encoders):
                append_oldest()  # in turn, so it is this encoder's
            encoder.start(files[file], field, records)
            waiting.append((file, first, encoder))
        while waiting:
            append_oldest()


@contextlib.contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A function of (bytes read, tokens so far) that moves a progress bar on stderr."""
    if not shown:
        yield lambda position, tokens: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("tokenising"),
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
) -> TokenStore:
    """Tokenises `files` in order into the store `out`; one end-of-document token per document.

    The store is put together in `OUT.building` and renamed when complete, so `out` is whole or
    not there. An interrupted build goes on from its last finished shard when it is repeated; if
    `out` is there already and was built from the same inputs and settings, it is opened.

    Args:
      split: parts for train, valid and test (any scale).
      split_order: `contiguous` (by document order) or `interleaved` (documents dealt in rounds).
      field: JSON field or parquet column that holds the text.
      workers: processes that parse and tokenise; with 1, this process does, and the tokenizers
        package uses its own threads.
      progress: show a progress bar on stderr.
      shard_tokens: tokens per file of the store, and most that is lost by an interruption.
      input_hashes: content hashes that identify the inputs; default size and modification time.

    Raises:
      DataError: bad input (names file and line), no text at all, a setting that is not allowed,
        `out` in use for something else, or the disk is full.
    """
    if workers < 1 or shard_tokens < 1 or shard_tokens % store_format.CHUNK_TOKENS:
        raise DataError(
            f"workers={workers} shard_tokens={shard_tokens}: at least one worker, and a positive "
            f"multiple of {store_format.CHUNK_TOKENS} tokens per shard"
        )
    paths, out = [Path(file) for file in files], Path(out).resolve()
    if not out.name:
        raise DataError(f"{out}: is no name for a store; choose a folder below it")
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
    }
    key = store_format.json_sha256(identity)
    folder = building_folder(out)
    if (out / store_format.MANIFEST).is_file():  # finished, maybe where nothing can be written
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
                    store_format.write_atomically(folder / store_format.TOKENIZER, tokenizer.definition)
                with _progress(total, progress) as report:
                    _append_all(writer, paths, field, tokenizer, workers, report)
                writer.finish(manifest)
            publish(folder, out)
    except _WorkerDiedError as error:
        raise DataError(
            f"{folder}: a worker process died, perhaps for lack of memory; repeat the command with fewer than "
            f"{workers} workers to go on from the last finished shard"
        ) from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    return _open_same(out, tokenizer, key, checked, split_order)


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
) -> TokenStore:
    """The store of `files`, built below `cache_dir` the first time it is asked for.

    The folder's name is a hash of the files' contents, the tokenizer and the split, so a changed
    file gives another store and a moved one does not. Processes that ask at once build it once.

    Raises:
      DataError: as `build_store`.
    """
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    checked = check_split(split, split_order)
    try:
        hashes = [store_format.file_sha256(Path(file)) for file in files]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot open ({error.strerror})") from error
    key = store_format.json_sha256([store_format.VERSION, hashes, tokenizer.sha256, field, checked, split_order])
    return build_store(
        files,
        Path(cache_dir) / key[:24],
        tokenizer,
        checked,
        split_order,
        field=field,
        workers=workers,
        progress=progress,
        input_hashes=hashes,
    )
