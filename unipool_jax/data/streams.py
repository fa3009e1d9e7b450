"""Documents in a chosen order, read as one long stream of tokens."""

from collections.abc import Sequence

import numpy as np

from unipool_jax.data.store_reader import TokenStore

_BLOCK = 256


class DocumentStream:
    """The concatenation of documents of one store, addressed by token.

    Only the order (4 bytes a document) and every 256th start are kept in memory, as a corpus has
    millions of documents; lengths come from the store's memory-mapped offsets.

    Args:
      documents: indices into the store's documents, in stream order; repetition is allowed.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray):
        self.store = store
        self._documents = documents
        ends = np.cumsum(store.document_lengths(documents))
        self.num_tokens = int(ends[-1]) if len(ends) else 0
        # Copied, or the whole of `ends` stays alive.
        self._block_starts = np.concatenate([[0], ends[_BLOCK - 1 :: _BLOCK]])

    def segments(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The ranges of the store, in order, that stream tokens `start .. stop-1` are made of.

        Returns: starts and stops, int64 `[n]`; ranges that touch are joined.
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
    """Tokens of `(stream, start, stop)` ranges one after another, int32.

    All reads from one store are issued together, so that its storage can overlap them.
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
        stream.store.read_many(low, high) if low else []
        for stream, low, high in zip(streams, starts, stops, strict=True)
    ]
    return np.concatenate([np.empty(0, np.int32), *(pieces[stream][place] for stream, place in order)])
