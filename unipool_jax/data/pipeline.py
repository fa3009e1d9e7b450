"""Batches as a pure function of (seed, step, row): training windows and evaluation windows.

The training order is that of Megatron's GPT datasets, which the published experiments use: the same
stores and seed give the same batches.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from unipool_jax.data.documents import segment_ids
from unipool_jax.data.errors import DataError
from unipool_jax.data.splits import SplitName
from unipool_jax.data.store_format import json_sha256
from unipool_jax.data.store_reader import TokenStore
from unipool_jax.data.streams import DocumentStream, count_ranges, read_ranges


class Batch(NamedTuple):
    """Next-token prediction: `targets[b, s]` follows `inputs[b, s]` in the text.

    A single row, as returned by `WindowSource.__getitem__`, has no leading axis B.
    """

    inputs: np.ndarray  # [B, S] int32
    targets: np.ndarray  # [B, S] int32
    weights: np.ndarray  # [B, S] float32, 1 where the target counts, 0 for padding and prompts
    segments: np.ndarray | None = None  # [B, S] int32, the document of each input; None: documents are not kept apart

    def mapped(self, function: Callable[[np.ndarray], np.ndarray]) -> "Batch":
        """`function` of every array."""
        return Batch(*(None if array is None else function(array) for array in self))  # type: ignore[arg-type]


class Windows(Protocol):
    """A sequence of windows that can be read by index."""

    sequence_length: int

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """The windows `indices`, in that order, as rows."""
        ...


def _as_stores(stores: TokenStore | Sequence[TokenStore]) -> list[TokenStore]:
    stores = [stores] if isinstance(stores, TokenStore) else list(stores)
    if not stores:
        raise DataError("no token stores given")
    for store in stores[1:]:
        if store.tokenizer_sha256 != stores[0].tokenizer_sha256:
            raise DataError(
                f"{store.path} was built with tokenizer {store.tokenizer_name!r}, but "
                f"{stores[0].path} with {stores[0].tokenizer_name!r}; use stores of one tokenizer"
            )
    return stores


class _StoreWindows:
    """Shuffled windows of one split of one store.

    Args:
      needed: number of windows that will be used, as planned at first and after each extension, ascending; determines
        the number of epochs.

    Raises:
      DataError: the split is too short for one window.
    """

    def __init__(self, store: TokenStore, split: SplitName, length: int, needed: Sequence[int], seed: int):
        documents = store.split_documents(split)
        per_epoch = int(store.document_lengths(documents).sum())
        if per_epoch < length + 1:
            raise DataError(
                f"{store.path}: split {split!r} has {per_epoch} tokens in {len(documents)} "
                f"documents; one window of data.sequence_length={length} needs {length + 1}; add text, or lower it"
            )
        parts: list[np.ndarray] = []
        orders: list[np.ndarray] = []
        tokens = planned = 0
        for extension, wanted in enumerate(needed):
            if wanted <= planned:
                continue  # the epochs planned before have enough
            epochs = -(-(wanted * length + 1 - tokens) // per_epoch)
            total = (tokens + epochs * per_epoch - 1) // length
            before_last = (tokens + (epochs - 1) * per_epoch - 1) // length
            # As Megatron does: a last epoch that is used only in part is shuffled separately, so that
            # every document appears equally often in the epochs before it.
            from_last = wanted - before_last
            separate = epochs > 1 and from_last < int(0.8 * ((per_epoch - 1) // length))
            random = np.random.RandomState([seed, extension] if extension else seed)
            new = [np.tile(documents, epochs - 1), documents.copy()] if separate else [np.tile(documents, epochs)]
            for part in new:
                random.shuffle(part)
            parts += new
            border = before_last if separate else total
            for start, stop in [(planned, border), (border, total)] if separate else [(planned, border)]:
                order = np.arange(start, stop, dtype=np.uint32 if total < 1 << 32 else np.int64)
                random.shuffle(order)
                orders.append(order)
            tokens, planned = tokens + epochs * per_epoch, total
        self.stream = DocumentStream(store, np.concatenate(parts))
        del parts
        self.order = np.concatenate(orders)[: needed[-1]].copy()


class WindowSource:
    """Random access to the training windows of one split, blended over stores.

    Per store: the documents of the split are shuffled and concatenated; windows of S+1 tokens
    start every S tokens (adjacent windows share one token; an incomplete last one is dropped) and
    are shuffled, both with one NumPy `RandomState(seed)`. Windows cross document boundaries; the
    end-of-document token is an input and a target like any other. Epochs are shuffled together,
    except for a last epoch of which less than 80% is used; so where data repeats, the order depends
    on `num_windows`.

    A source that is extended begins as the shorter one. It goes on with the windows that are left of the
    epochs planned for that one; when all are used, further epochs are planned, with a shuffle of their own.

    Stores have equal weight: window j of n stores is window `j // n` of store `j mod n`. As in
    Megatron, each of several stores plans 0.5% more windows than it needs, which affects only the
    number of epochs.

    A store's order is computed when its first window is read.

    Args:
      stores: one, or several made by one tokenizer.
      split: `train`, `valid` or `test`.
      sequence_length: S, the number of predicted tokens per window.
      num_windows: length of the source, or its lengths as it began and after each extension, ascending.
      seed: of both shuffles.
      document_mask: whether batches say which document a token belongs to; the windows are the same.

    Raises:
      DataError: no store, mixed tokenizers, or (when read) a split without one full window.

    Example: `WindowSource(store, "train", 1024, 60_000 * 512, seed=1234)[0].targets`.
    """

    def __init__(
        self,
        stores: TokenStore | Sequence[TokenStore],
        split: SplitName,
        sequence_length: int,
        num_windows: int | Sequence[int],
        seed: int,
        *,
        document_mask: bool = False,
    ):
        lengths = [num_windows] if isinstance(num_windows, int) else list(num_windows)
        if sequence_length < 1 or lengths[0] < 1:
            raise DataError(f"sequence_length={sequence_length} num_windows={num_windows}: must be positive")
        if any(a >= b for a, b in itertools.pairwise(lengths)):
            raise DataError(f"num_windows={num_windows}: the lengths of a source must ascend")
        self.stores = _as_stores(stores)
        self.split = split
        self.sequence_length = sequence_length
        self._lengths = lengths
        self._num_windows = lengths[-1]
        self._seed = seed
        self._document_mask = document_mask
        shares = [-(-windows // len(self.stores)) for windows in lengths]
        self._needed = shares if len(self.stores) == 1 else [-(-share * 1005 // 1000) for share in shares]
        self._windows: list[_StoreWindows | None] = [None] * len(self.stores)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._num_windows

    def _store_windows(self, store: int) -> _StoreWindows:
        with self._lock:  # several loader threads may need the same store
            windows = self._windows[store]
            if windows is None:
                windows = _StoreWindows(
                    self.stores[store],
                    self.split,
                    self.sequence_length,
                    self._needed,
                    self._seed,
                )
                self._windows[store] = windows
            return windows

    def _ranges(self, indices: Sequence[int]) -> tuple[list[DocumentStream], list[tuple[int, int, int]]]:
        """The streams that windows `indices` lie in, and where; IndexError if out of range."""
        ranges = []
        used: list[DocumentStream] = []
        places: dict[int, int] = {}
        for index in indices:
            if not 0 <= index < self._num_windows:
                raise IndexError(f"window {index}: this source has {self._num_windows}")
            store = index % len(self.stores)
            windows = self._store_windows(store)
            if store not in places:
                places[store] = len(used)
                used.append(windows.stream)
            start = int(windows.order[index // len(self.stores)]) * self.sequence_length
            ranges.append((places[store], start, start + self.sequence_length + 1))
        return used, ranges

    def tokens(self, indices: Sequence[int]) -> np.ndarray:
        """Windows `indices` as int32 `[len(indices), S + 1]`; IndexError if out of range."""
        return read_ranges(*self._ranges(indices)).reshape(len(indices), self.sequence_length + 1)

    def _weights(self, indices: Sequence[int]) -> np.ndarray:
        """Weights of the targets of windows `indices`, float32 `[len(indices), S]`."""
        if all(store.all_count for store in self.stores):
            return np.ones((len(indices), self.sequence_length), np.float32)
        counted = count_ranges(*self._ranges(indices)).reshape(len(indices), self.sequence_length + 1)
        return counted[:, 1:].astype(np.float32)

    def fingerprint(self) -> str:
        """Hash of everything that determines the content of the windows.

        A resumed run with another fingerprint would see other batches. `num_windows` is part of it,
        because it determines how epochs are shuffled.
        """
        stores = [store.fingerprint() for store in self.stores]
        lengths = self._num_windows if len(self._lengths) == 1 else self._lengths
        return json_sha256([stores, self.split, self.sequence_length, lengths, self._seed])

    def batch(self, indices: Sequence[int]) -> Batch:
        """Windows `indices` as a batch of `len(indices)` rows."""
        tokens = self.tokens(indices)
        inputs = tokens[:, :-1]
        segments = segment_ids(inputs, self.stores[0].eod) if self._document_mask else None
        return Batch(inputs, tokens[:, 1:], self._weights(indices), segments)

    def __getitem__(self, index: int) -> Batch:
        """Window `index` as one row: arrays `[S]`."""
        return self.batch([index]).mapped(lambda rows: rows[0])


class EvalWindows:
    """Every token of a split, in document order, as the target of exactly one window.

    Only the first token of all has no context and is not a target. The last window is padded with
    weight 0. The denominators of losses over these windows are therefore exact and independent of
    the batch size, and runs are compared on identical text.

    Args:
      stores: one, or several made by one tokenizer, which are concatenated.
      max_windows: use at most this many windows, from the first; None is all of them.
      document_mask: as in `WindowSource`.

    Raises:
      DataError: fewer than two tokens in the split.
    """

    def __init__(
        self,
        stores: TokenStore | Sequence[TokenStore],
        split: SplitName,
        sequence_length: int,
        max_windows: int | None = None,
        *,
        document_mask: bool = False,
    ):
        self.stores = _as_stores(stores)
        self._split = split
        self._document_mask = document_mask
        self.sequence_length = sequence_length
        if sequence_length < 1 or (max_windows is not None and max_windows < 1):
            raise DataError(f"sequence_length={sequence_length} max_windows={max_windows}: must be positive")
        self._streams = [DocumentStream(store, store.split_documents(split)) for store in self.stores]
        self._ends = list(itertools.accumulate(stream.num_tokens for stream in self._streams))
        targets = self._ends[-1] - 1
        if targets < 1:
            documents = sum(store.num_documents for store in self.stores)
            raise DataError(
                f"{self.stores[0].path}: split {split!r} has {self._ends[-1]} tokens; evaluation needs at least two. "
                f"Splits consist of full documents, and there are {documents}: add documents (a .txt file is one, a "
                "line of .jsonl is one), change the split, or evaluate another one"
            )
        if max_windows is not None:
            targets = min(targets, max_windows * sequence_length)
        self.num_targets = targets

    def __len__(self) -> int:
        return -(-self.num_targets // self.sequence_length)

    def fingerprint(self) -> str:
        """Hash of everything that determines the windows and their targets."""
        stores = [store.fingerprint() for store in self.stores]
        return json_sha256([stores, self._split, self.sequence_length, self.num_targets])

    def _ranges(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Tokens `start .. stop-1` of the concatenated streams, as (stream, start, stop) within each stream."""
        ranges = []
        for stream, end in enumerate(self._ends):
            begin = end - self._streams[stream].num_tokens
            low, high = max(start, begin), min(stop, end)
            if low < high:
                ranges.append((stream, low - begin, high - begin))
        return ranges

    def batch(self, indices: Sequence[int]) -> Batch:
        """Windows `indices` as rows; padding has weight 0 and id 0. Raises IndexError if out of range."""
        length = self.sequence_length
        tokens = np.zeros((len(indices), length + 1), np.int32)
        sizes = np.zeros((len(indices), 1), np.int64)
        ranges = []
        for row, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"window {index}: there are {len(self)}")
            sizes[row] = min(length, self.num_targets - index * length)
            ranges += self._ranges(index * length, index * length + int(sizes[row, 0]) + 1)
        tokens[np.arange(length + 1) <= sizes] = read_ranges(self._streams, ranges)
        real = np.arange(length) < sizes
        weights = real.astype(np.float32)
        if not all(store.all_count for store in self.stores):
            counted = np.zeros(tokens.shape, bool)
            counted[np.arange(length + 1) <= sizes] = count_ranges(self._streams, ranges)
            weights *= counted[:, 1:]
        inputs = tokens[:, :-1] * real
        segments = segment_ids(inputs, self.stores[0].eod, real) if self._document_mask else None
        return Batch(inputs, tokens[:, 1:], weights, segments)

    def target_counts(self) -> np.ndarray:
        """How often each id is a target, int64 `[vocab_size]`.

        `target_counts() @ tokenizer.token_bytes` is the exact number of predicted bytes.
        """
        counts = np.zeros(self.stores[0].vocab_size, np.int64)
        for start in range(0, self.num_targets, 1 << 20):
            stop = min(start + (1 << 20), self.num_targets)
            ranges = self._ranges(start + 1, stop + 1)
            tokens = read_ranges(self._streams, ranges)
            if not all(store.all_count for store in self.stores):
                tokens = tokens[count_ranges(self._streams, ranges)]
            counts += np.bincount(tokens, minlength=len(counts))
        return counts


def _rows(rows: Sequence[int] | None, batch_size: int) -> Sequence[int]:
    """`rows`, or all rows of a batch for None.

    Raises:
      DataError: no rows, or rows out of range, repeated or out of order.
    """
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size}: must be positive")
    if rows is None:
        return range(batch_size)
    if not rows or rows[0] < 0 or rows[-1] >= batch_size or any(a >= b for a, b in itertools.pairwise(rows)):
        raise DataError(f"rows={list(rows)}: must be ascending numbers from 0 to {batch_size - 1}, without repetition")
    return rows


def batch_at(source: Windows, step: int, batch_size: int, rows: Sequence[int] | None = None) -> Batch:
    """`rows` (default all) of the batch of `step`: windows `step * batch_size + row`."""
    return source.batch([step * batch_size + row for row in _rows(rows, batch_size)])


def training_batches(
    source: Windows,
    *,
    batch_size: int,
    start_step: int,
    end_step: int,
    rows: Sequence[int] | None = None,
    num_threads: int = 4,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Batches of steps `start_step .. end_step-1`, prefetched by Grain.

    The batch of a step depends only on the source and the step: to resume, start at another step,
    with any number of processes.

    Args:
      batch_size: rows over all processes.
      rows: those that this process loads, in order; None is all of them.
      num_threads: threads that load batches.
      prefetch: number of batches to prefetch.

    Raises:
      DataError: invalid rows, or a source with too few windows.
    """
    rows = _rows(rows, batch_size)
    if not 0 <= start_step <= end_step or end_step * batch_size > len(source):
        raise DataError(f"steps {start_step}..{end_step} of {batch_size} windows: the source has {len(source)} windows")
    return _loaded(
        lambda step: batch_at(source, step, batch_size, rows),
        range(start_step, end_step),
        num_threads,
        prefetch,
    )


def _loaded(make: Callable[[int], Batch], steps: range, num_threads: int, prefetch: int) -> Iterator[Batch]:
    """`make(step)` for each of `steps`, in order, prefetched by Grain's threads."""
    import grain

    if not steps:
        return
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(make)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    iterator = iter(dataset.to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def evaluation_batches(
    windows: Windows,
    *,
    batch_size: int,
    start: int = 0,
    stop: int | None = None,
    rows: Sequence[int] | None = None,
    num_threads: int = 4,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Windows `start .. stop-1` in order, in batches of constant shape.

    The last batch is padded with rows of weight 0. Every process gets the same number of batches; `rows` are those that
    this process loads, in order, None is all of them.

    Raises:
      DataError: invalid rows, or windows out of range.
    """
    own = _rows(rows, batch_size)
    stop = len(windows) if stop is None else stop
    if not 0 <= start < stop <= len(windows):
        raise DataError(f"windows {start}..{stop}: there are {len(windows)}")

    def make(step: int) -> Batch:
        first = start + step * batch_size
        batch = windows.batch([i for row in own if (i := first + row) < stop])
        missing = len(own) - len(batch.inputs)
        return batch.mapped(lambda rows: np.pad(rows, ((0, missing), (0, 0))))

    return _loaded(make, range(-(-(stop - start) // batch_size)), num_threads, prefetch)


def moving_evaluation_batches(source: Windows, evaluation: int, num_windows: int, **options: Any) -> Iterator[Batch]:
    """Batches of evaluation number `evaluation` (from 0): windows `evaluation * num_windows` and on.

    The published protocol: the shuffled validation stream is not rewound, so successive evaluations
    see different text. `source` is a `WindowSource` over `valid`, long enough for all evaluations;
    `options` are those of `evaluation_batches`.
    """
    start = evaluation * num_windows
    return evaluation_batches(source, start=start, stop=start + num_windows, **options)
