"""Documents in a chosen order, read as one long stream of tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from unipool_jax.data.store_reader import TokenStore

_BLOCK = 256

Ranges = Callable[[TokenStore, Sequence[int], Sequence[int]], list[np.ndarray]]


class DocumentStream:
    """The concatenation of documents of one store, indexed by token.

    A corpus has millions of documents, so only their order (4 bytes each) and every 256th start
    are kept in memory; lengths come from the store's memory-mapped offsets.

    Args:
      documents: indices of documents of `store`, in stream order; may repeat.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray):
        self.store = store
        self._documents = documents
        ends = np.cumsum(store.document_lengths(documents))
        self.num_tokens = int(ends[-1]) if len(ends) else 0
        # A copy: a view would keep all of `ends` alive.
        self._block_starts = np.concatenate([[0], ends[_BLOCK - 1 :: _BLOCK]])

    def segments(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The ranges of the store, in order, that make up stream tokens `start .. stop-1`.

        Returns:
          starts and stops, int64 `[n]`; adjacent ranges are merged.
        """
        first = int(np.searchsorted(self._block_starts, start, side="right")) - 1
        last = int(np.searchsorted(self._block_starts, stop, side="left"))
        documents = self._documents[first * _BLOCK : last * _BLOCK]
        begins = self.store.document_starts(documents)
        lengths = self.store.document_lengths(documents)
        stream_ends = self._block_starts[first] + np.cumsum(lengths)
        stream_begins = stream_ends - lengths
        used = (stream_ends > start) & (stream_begins < stop)
        skip = np.maximum(start - stream_begins[used], 0)
        cut = np.maximum(stream_ends[used] - stop, 0)
        starts, stops = begins[used] + skip, begins[used] + lengths[used] - cut
        breaks = starts[1:] != stops[:-1]
        return starts[np.append(True, breaks)], stops[np.append(breaks, True)]


def read_ranges(streams: Sequence[DocumentStream], ranges: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Concatenated tokens of `(stream, start, stop)` ranges, int32 `[total length]`."""
    return _joined(streams, ranges, lambda store, starts, stops: store.read_many(starts, stops), np.dtype(np.int32))


def count_ranges(streams: Sequence[DocumentStream], ranges: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Which tokens of `(stream, start, stop)` ranges count as targets, bool `[total length]`."""
    return _joined(streams, ranges, lambda store, starts, stops: store.count_many(starts, stops), np.dtype(bool))


def _joined(
    streams: Sequence[DocumentStream], ranges: Sequence[tuple[int, int, int]], read: Ranges, dtype: np.dtype[Any]
) -> np.ndarray:
    """What `read` says of `ranges`, joined.

    All reads of one store are issued together, so that they can overlap.
    """
    starts: list[list[int]] = [[] for _ in streams]
    stops: list[list[int]] = [[] for _ in streams]
    order: list[tuple[int, int]] = []
    for stream, start, stop in ranges:
        for low, high in zip(*streams[stream].segments(start, stop), strict=True):
            order.append((stream, len(starts[stream])))
            starts[stream].append(int(low))
            stops[stream].append(int(high))
    pieces = [
        read(stream.store, low, high) if low else [] for stream, low, high in zip(streams, starts, stops, strict=True)
    ]
    return np.concatenate([np.empty(0, dtype), *(pieces[stream][place] for stream, place in order)])
