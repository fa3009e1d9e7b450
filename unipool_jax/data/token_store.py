"""Builds token stores from files of text; opens them (see `store_reader`).

store = build_store(["pile/00.jsonl.zst"], "stores/00", "gpt2")
store.read(0, 1025)
"""

import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process, resource_tracker
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from unipool_jax.data import store_format
from unipool_jax.data.assets import demo_corpus_path
from unipool_jax.data.errors import DataError
from unipool_jax.data.readers import DocumentFile, Record, document_text, file_format
from unipool_jax.data.splits import PILE_SPLIT, check_split
from unipool_jax.data.store_reader import TokenStore, building_folder, open_store
from unipool_jax.data.store_writer import Encoded, StoreWriter, cannot_write, publish
from unipool_jax.data.tokenizer import Tokenizer, load_tokenizer, parse_tokenizer

__all__ = ["TokenStore", "build_store", "cached_store", "demo_corpus_path", "open_store"]

# Work handed to one process at a time: about this many bytes of undecoded records.
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


def _exit_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


class _Worker:
    """The tokenizer of a worker process, loaded once when the process starts."""

    tokenizer: Tokenizer

    @classmethod
    def start(cls, name: str, definition: bytes | None) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        parent = parent_process()
        if parent is not None:
            # A killed parent cannot stop its workers, and they would wait for work for ever.
            Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()
        cls.tokenizer = load_tokenizer(name) if definition is None else parse_tokenizer(name, definition)

    @classmethod
    def encode(cls, path: Path, field: str, records: list[Record]) -> _Numbers:
        return _encode(cls.tokenizer, path, field, records)


_Submit = Callable[[Path, str, list[Record]], "Future[_Numbers]"]


@contextlib.contextmanager
def _encoder(tokenizer: Tokenizer, workers: int) -> Iterator[_Submit]:
    """A function that starts encoding records, in this process or in `workers` others."""
    if workers == 1:

        def encode_here(path: Path, field: str, records: list[Record]) -> "Future[_Numbers]":
            future: Future[_Numbers] = Future()
            future.set_result(_encode(tokenizer, path, field, records))
            return future

        yield encode_here
        return
    # Spawned, not forked: this process has threads (TensorStore, maybe JAX) whose locks a fork
    # would copy in an unknown state.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _Worker.start, (tokenizer.name, tokenizer.definition))

    def encode_there(path: Path, field: str, records: list[Record]) -> "Future[_Numbers]":
        # Submitting starts processes, which inherit the signal mask: Ctrl-C reaches this process
        # only, even while they are still importing.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return pool.submit(_Worker.encode, path, field, records)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    resource_tracker.ensure_running()  # would be started by the first submit and reset the mask
    try:
        yield encode_there
    finally:
        pool.shutdown(cancel_futures=True)


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
    waiting: deque[tuple[int, int, Future[_Numbers]]] = deque()

    def append_oldest() -> None:
        file, first, future = waiting.popleft()
        writer.append(Encoded(file, first, *future.result()))

    def report_bytes(position: int) -> None:
        report(position, writer.num_tokens)

    with _encoder(tokenizer, workers) as submit:
        for file, first, records in _batches(files, field, writer.next_record, report_bytes):
            waiting.append((file, first, submit(files[file], field, records)))
            if len(waiting) > 2 * workers:
                append_oldest()
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
    except BrokenProcessPool as error:
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
