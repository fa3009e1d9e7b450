"""Reads pairs of Megatron-LM `.bin` and `.idx` files (MMIDIDX, version 1).

`.idx`: 9 bytes `MMIDIDX\\0\\0`; uint64 version; uint8 dtype code; uint64 number of sequences n;
uint64 length m of the document index; int32 [n] sequence lengths; int64 [n] byte offsets into
`.bin`; int64 [m] document index. All little-endian. `.bin`: the tokens of all sequences.

As in Megatron's GPT datasets, sequences (not entries of the document index) are split and shuffled;
its preprocessing normally writes one sequence per document.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from unipool_jax.data.errors import DataError
from unipool_jax.data.hashing import Remembered
from unipool_jax.data.splits import SplitOrder, check_split
from unipool_jax.data.store_reader import TokenStore
from unipool_jax.data.tokenizer import Tokenizer

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = np.dtype([("magic", "S9"), ("version", "<u8"), ("code", "u1"), ("sequences", "<u8"), ("index", "<u8")])
_LOOKED_AT = 1000
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def megatron_prefix(path: Path) -> Path | None:
    """`path` without `.bin` or `.idx` if both files exist, else None."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    both = (Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx"))
    return prefix if all(file.is_file() for file in both) else None


class MegatronTokenStore(TokenStore):
    """A Megatron pair as a token store; ids are checked against the vocabulary when they are read.

    Raises:
      DataError: not a Megatron pair, damaged, or with ids outside the vocabulary of `tokenizer`.
    """

    def __init__(self, prefix: Path, tokenizer: Tokenizer, split: Sequence[float], split_order: str):
        self.path = prefix
        self.split = check_split(split, split_order)
        self.split_order = cast(SplitOrder, split_order)
        self._tokenizer = tokenizer
        self.tokenizer_name = tokenizer.name
        self.tokenizer_sha256 = tokenizer.sha256
        self.vocab_size = tokenizer.vocab_size
        self.eod = tokenizer.eod
        self.text_bytes = None
        self.manifest = {}
        self._bin = Path(f"{prefix}.bin")
        self._load_index(Path(f"{prefix}.idx"))
        self._tokens = np.memmap(self._bin, dtype=self.dtype, mode="r")
        self.read(0, min(self.num_tokens, 1 << 16))  # fail early if the tokenizer is the wrong one

    def _load_index(self, path: Path) -> None:
        size = path.stat().st_size
        if size < _HEADER.itemsize:
            raise DataError(f"{path}: {size} bytes, too short for a Megatron index")
        raw = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        magic = raw[:9].tobytes()
        header = raw[: _HEADER.itemsize].view(_HEADER)[0]
        if magic != _MAGIC or header["version"] != 1:
            raise DataError(f"{path}: starts with {magic!r} version {header['version']}; expected {_MAGIC!r} version 1")
        if int(header["code"]) not in _DTYPES:
            raise DataError(f"{path}: dtype code {header['code']} is not an integer type")
        count, index = int(header["sequences"]), int(header["index"])
        if size != _HEADER.itemsize + 12 * count + 8 * index:
            raise DataError(f"{path}: {size} bytes do not match {count} sequences; truncated?")
        if count == 0:
            raise DataError(f"{path}: holds no sequences")
        start = _HEADER.itemsize
        lengths = raw[start : start + 4 * count].view("<i4")
        pointers = raw[start + 4 * count : start + 12 * count].view("<i8")
        self.dtype = np.dtype(_DTYPES[int(header["code"])])
        # Both stay memory-mapped: the thirty shards of the Pile hold 170 million documents.
        self._lengths, self._pointers, self._index = lengths, pointers, path
        self.num_documents = count
        self.num_tokens = int(lengths.sum(dtype=np.int64))
        if lengths.min() < 0 or (pointers != self.document_offsets[:-1] * self.dtype.itemsize).any():
            raise DataError(f"{path}: sequences are not contiguous")
        stored = self._bin.stat().st_size
        if self.num_tokens == 0 or stored != self.num_tokens * self.dtype.itemsize:
            raise DataError(
                f"{self._bin}: {stored} bytes, but its index lists {self.num_tokens} tokens of "
                f"{self.dtype.itemsize} bytes; copy the pair again"
            )

    def document_problem(self) -> str | None:
        """Looks at the first documents: preprocessing ended all of them with the token, or none."""
        ends = np.cumsum(self._lengths[:_LOOKED_AT], dtype=np.int64)[self._lengths[:_LOOKED_AT] > 0]
        if (self._tokens[ends - 1] == self.eod).all():
            return None
        return (
            f"{self.path}: documents do not end with end-of-document token {self.eod} of {self.tokenizer_name!r}; "
            "make the pair anew, by preprocess_data.py --append-eod"
        )

    @property
    def document_offsets(self) -> np.ndarray:  # type: ignore[override]
        """Computed from the lengths on each access, so that the array is not kept in memory."""
        return np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])

    def document_starts(self, documents: np.ndarray) -> np.ndarray:
        return self._pointers[documents] // self.dtype.itemsize

    def document_lengths(self, documents: np.ndarray) -> np.ndarray:
        return self._lengths[documents].astype(np.int64)

    def _stored(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self._tokens[start:stop])

    def _block_hashes(self) -> list[str]:
        """Computed from the `.bin`, because a pair records no hashes; of a large pair once, then remembered."""
        size = self._bin.stat().st_size + self._index.stat().st_size
        remembered = Remembered(self.path, self.memory, size)
        blocks = super()._block_hashes
        return remembered.get("tokens", [self._bin, self._index], lambda: " ".join(blocks())).split()

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def _read_many(self, starts: Sequence[int], stops: Sequence[int]) -> list[np.ndarray]:
        pieces = []
        for start, stop in zip(starts, stops, strict=True):
            piece = self._tokens[start:stop].astype(np.int64)
            if stop > start and not 0 <= piece.min() <= piece.max() < self.vocab_size:
                raise DataError(
                    f"{self._bin}: tokens {start}..{stop} have ids {piece.min()}..{piece.max()}, "
                    f"but tokenizer {self.tokenizer_name!r} has {self.vocab_size}; name the "
                    "tokenizer that wrote these files"
                )
            pieces.append(piece.astype(np.int32))
        return pieces

    def verify(self) -> None:
        """Checks every id against the vocabulary; Megatron files hold no hashes."""
        for start in range(0, self.num_tokens, 1 << 24):
            self.read(start, min(start + (1 << 24), self.num_tokens))
