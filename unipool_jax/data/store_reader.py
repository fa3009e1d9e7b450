"""Read-only random access to token stores."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unipool_jax.config.files import FileError, check_fields
from unipool_jax.config.ranges import RANGES
from unipool_jax.data import hashing, store_format
from unipool_jax.data.errors import DataError
from unipool_jax.data.splits import (
    Split,
    SplitName,
    SplitOrder,
    check_split,
    split_documents,
)
from unipool_jax.data.tokenizer import BUILT_IN, Tokenizer, load_tokenizer, parse_tokenizer


class TokenStore:
    """One stream of token ids in document order; each document ends with the `eod` token.

    Attributes:
      path: folder, or Megatron prefix.
      dtype: of the stored ids.
      num_tokens, num_documents: totals.
      document_offsets: `[num_documents + 1]` int64; document d is tokens
        `document_offsets[d] .. document_offsets[d + 1] - 1`.
      tokenizer_name, tokenizer_sha256, vocab_size, eod: of the tokenizer that wrote the ids.
      split, split_order: how documents are divided into train, valid and test.
      text_bytes: UTF-8 bytes of all documents; None where unknown (Megatron).
      manifest: everything recorded about the store; empty for Megatron.
    """

    path: Path
    dtype: np.dtype[Any]
    num_tokens: int
    num_documents: int
    document_offsets: np.ndarray
    tokenizer_name: str
    tokenizer_sha256: str
    vocab_size: int
    eod: int
    split: Split
    split_order: SplitOrder
    text_bytes: int | None
    manifest: dict[str, Any]
    all_count: bool = True
    """Whether every token counts as a target; if not, `count_many` says which do."""
    memory: Path | None = None
    """Folder that remembers hashes of large stores; see `hashing`."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that wrote the ids; raises DataError if it cannot be loaded."""
        raise NotImplementedError

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start .. stop-1` as int32 `[stop - start]`.

        Raises:
          DataError: out of range, or the stored bytes are damaged.
        """
        return self.read_many([start], [stop])[0]

    def read_many(self, starts: Sequence[int], stops: Sequence[int]) -> list[np.ndarray]:
        """`read` for several ranges, concurrently where the storage allows it."""
        for start, stop in zip(starts, stops, strict=True):
            if not 0 <= start <= stop <= self.num_tokens:
                raise DataError(f"{self.path}: tokens {start}..{stop} are out of range; it has {self.num_tokens}")
        return self._read_many(starts, stops)

    def _read_many(self, starts: Sequence[int], stops: Sequence[int]) -> list[np.ndarray]:
        raise NotImplementedError

    def count_many(self, starts: Sequence[int], stops: Sequence[int]) -> list[np.ndarray]:
        """Which tokens of each range count as targets, bool; arguments as `read_many`."""
        return [np.ones(stop - start, bool) for start, stop in zip(starts, stops, strict=True)]

    def _stored(self, start: int, stop: int) -> np.ndarray:
        """Tokens as they are stored, which is faster than `read`."""
        return self.read(start, stop)

    def split_documents(self, name: SplitName) -> np.ndarray:
        """Indices of the documents of split `name`, ascending, int32."""
        return split_documents(self.num_documents, self.split, self.split_order, name)

    def document_problem(self) -> str | None:
        """Why it cannot be told from the tokens where documents end; None where it can."""
        return None

    def document_starts(self, documents: np.ndarray) -> np.ndarray:
        """First token of each of `documents`, int64."""
        return self.document_offsets[documents]

    def document_lengths(self, documents: np.ndarray) -> np.ndarray:
        """Tokens in each of `documents`, int64."""
        lengths = self.document_offsets[documents + np.int32(1)]
        lengths -= self.document_offsets[documents]
        return lengths

    @functools.cached_property
    def content(self) -> str:
        """Hash of the tokens and of where documents end, whatever files hold them.

        Raises:
          DataError: the store was changed after it was built.
        """
        offsets = hashlib.sha256(self.document_offsets.astype("<i8").tobytes()).hexdigest()
        return store_format.json_sha256([offsets, self._block_hashes()])

    def fingerprint(self) -> str:
        """Hash of the contents; stores with equal fingerprints have the same tokens and splits."""
        return store_format.json_sha256([self.tokenizer_sha256, self.split, self.split_order, self.content])

    def _block_hashes(self) -> list[str]:
        """Hashes of consecutive blocks of `store_format.SHARD_TOKENS` tokens."""
        size = store_format.SHARD_TOKENS
        return [self._hash_block(start, start + size) for start in range(0, self.num_tokens, size)]

    def _hash_block(self, start: int, stop: int) -> str:
        tokens = self._stored(start, min(stop, self.num_tokens))
        return hashing.tokens_sha256(tokens, store_format.token_dtype(self.vocab_size))

    def verify(self) -> None:
        """Compares every file with its recorded hash; raises DataError that names the file."""
        raise NotImplementedError


_FIELDS = {
    "dtype": str,
    "tokens": int,
    "documents": int,
    "text_bytes": int,
    "tokenizer.name": str,
    "tokenizer.sha256": str,
    "tokenizer.vocab_size": int,
    "tokenizer.eod": int,
    "split": list,
    "split_order": str,
    "shard_tokens": int,
    "shards": list,
    "inputs": list,
    "document_offsets.bytes": int,
    "document_offsets.sha256": str,
}
"""What a manifest must have."""


class ZarrTokenStore(TokenStore):
    """A store written by `build_store`; see `store_format` for its layout.

    Raises:
      DataError: no finished store, another format version, missing or resized files, or a split
        other than the one it was built with.
    """

    def __init__(self, path: Path, split: Sequence[float] | None, split_order: str | None):
        self.path = path
        manifest = store_format.read_json(path / store_format.MANIFEST)
        found = (manifest.get("format"), manifest.get("version"))
        if found != (store_format.FORMAT, store_format.VERSION):
            raise DataError(
                f"{path}: format {found[0]!r} version {found[1]!r}; expected "
                f"{store_format.FORMAT!r} version {store_format.VERSION}: rebuild the store"
            )
        # Stores of earlier versions have no such hash.
        if manifest.get(store_format.MANIFEST_HASH) not in (None, store_format.manifest_sha256(manifest)):
            raise DataError(f"{path / store_format.MANIFEST}: differs from its own hash; rebuild the store")
        self.manifest = manifest
        try:
            check_fields(manifest, path / store_format.MANIFEST, _FIELDS, "rebuild the store")
            self._read_manifest(manifest)
        except DataError:
            raise
        except (FileError, KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise DataError(f"{path / store_format.MANIFEST}: incomplete ({error}); rebuild the store") from error
        asked = check_split(split or self.split, split_order or self.split_order)
        if asked != self.split or (split_order or self.split_order) != self.split_order:
            raise DataError(
                f"{path}: built with split={self.split} split_order={self.split_order}, not "
                f"split={asked} split_order={split_order or self.split_order}; omit the split "
                "or build another store"
            )
        self._check_files()

    def _read_manifest(self, manifest: dict[str, Any]) -> None:
        self.dtype = np.dtype(manifest["dtype"])
        self.num_tokens, self.num_documents = manifest["tokens"], manifest["documents"]
        self.text_bytes = manifest["text_bytes"]
        self.tokenizer_name = manifest["tokenizer"]["name"]
        self.tokenizer_sha256 = manifest["tokenizer"]["sha256"]
        self.vocab_size, self.eod = manifest["tokenizer"]["vocab_size"], manifest["tokenizer"]["eod"]
        self.split_order = manifest["split_order"]
        self.split = check_split(manifest["split"], self.split_order)
        self._shard_tokens = manifest["shard_tokens"]
        if not 0 <= self.eod < self.vocab_size <= RANGES["model.vocab_size"].high or self._shard_tokens < 1:
            raise ValueError(f"{self.vocab_size} ids, end {self.eod}, {self._shard_tokens} tokens in a shard")
        self._files = [(self.path / store_format.OFFSETS, manifest["document_offsets"])]
        for index, shard in enumerate(manifest["shards"]):
            check_fields(shard, f"shard {index}", {"bytes": int, "sha256": str})
            self._files.append((store_format.shard_path(self.path, index), shard))
        # Without checksums of their own, as the shards have. Earlier versions did not record the second.
        self._unchecked = self._files[:1]
        if "array_metadata" in manifest:
            self._unchecked += [(self.path / store_format.ARRAY_METADATA, manifest["array_metadata"])]

    def _check_files(self) -> None:
        for path, recorded in self._files:
            size = path.stat().st_size if path.is_file() else None
            if size != recorded["bytes"]:
                raise DataError(
                    f"{path}: {'missing' if size is None else f'{size} bytes'}, expected "
                    f"{recorded['bytes']} bytes; copy the store again or rebuild it"
                )
        _compare(self._unchecked)
        try:
            self._array = store_format.open_array(self.path, self.dtype, self._shard_tokens, write=False)
            mapped = np.load(self.path / store_format.OFFSETS, mmap_mode="r", allow_pickle=False)
            offsets = mapped.view(np.ndarray)  # the same memory; indexing np.memmap itself is slow
        except Exception as error:  # of TensorStore, or of the parser of the array's header
            raise DataError(f"{self.path}: damaged store ({error}); rebuild it") from error
        if (
            self._array.shape != (self.num_tokens,)
            or offsets.dtype != np.int64
            or offsets.shape != (self.num_documents + 1,)
            or (offsets[0], offsets[-1]) != (0, self.num_tokens)
        ):
            raise DataError(f"{self.path}: manifest and contents disagree; rebuild the store")
        self.document_offsets = offsets

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:  # type: ignore[override]
        path = self.path / store_format.TOKENIZER
        if path.is_file():
            tokenizer = parse_tokenizer(self.tokenizer_name, path.read_bytes())
        elif self.tokenizer_name in BUILT_IN:
            tokenizer = load_tokenizer(self.tokenizer_name)
        else:
            raise DataError(f"{path}: missing; copy the store again or rebuild it")
        check_tokenizer(self, tokenizer)
        return tokenizer

    def _read_many(self, starts: Sequence[int], stops: Sequence[int]) -> list[np.ndarray]:
        try:
            futures = [self._array[start:stop].read() for start, stop in zip(starts, stops, strict=True)]
            rows = [future.result() for future in futures]
        except (ValueError, OSError) as error:
            raise DataError(f"{self.path}: damaged store ({error}); rebuild it") from error
        if any(len(row) and int(row.max()) >= self.vocab_size for row in rows):
            raise DataError(f"{self.path}: damaged store (ids above its {self.vocab_size} tokens); rebuild it")
        return [row.astype(np.int32) for row in rows]

    def _stored(self, start: int, stop: int) -> np.ndarray:
        try:
            return np.asarray(self._array[start:stop].read().result())
        except (ValueError, OSError) as error:
            raise DataError(f"{self.path}: damaged store ({error}); rebuild it") from error

    def _block_hashes(self) -> list[str]:
        """One hash a shard: recorded in the manifest, and computed where the shard may have changed since.

        All of a small store is computed. Of a large one it is what is newer than the manifest, which is written last,
        and what has no recorded hash (stores of earlier versions). Document offsets are always compared.
        """
        offsets, recorded = self._files[0]
        if store_format.file_sha256(offsets) != recorded["sha256"]:
            raise _changed(offsets)
        size = sum(recorded["bytes"] for _, recorded in self._files)
        manifest = hashing.last_change(self.path / store_format.MANIFEST)
        remembered = hashing.Remembered(self.path, self.memory, size)
        hashes = []
        for index, (path, recorded) in enumerate(self._files[1:]):
            known = recorded.get("tokens_sha256")
            if known is None or size <= hashing.SMALL or hashing.last_change(path) > manifest:
                start = index * self._shard_tokens
                compute = functools.partial(self._hash_block, start, start + self._shard_tokens)
                found = remembered.get(str(index), [path], compute)
                if known not in (None, found):
                    raise _changed(path)
                known = found
            hashes.append(known)
        return hashes

    def verify(self) -> None:
        _compare(self._files)


def _compare(files: list[tuple[Path, dict[str, Any]]]) -> None:
    """Raises DataError unless files have the hashes in the manifest."""
    for path, recorded in files:
        try:
            found = store_format.file_sha256(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); copy the store again or rebuild it") from error
        if found != recorded["sha256"]:
            raise DataError(f"{path}: sha256 differs from the manifest; copy the store again or rebuild it")


def _changed(path: Path) -> DataError:
    return DataError(
        f"{path}: changed after its store was built; copy the store again, or delete its folder and build it anew"
    )


def check_tokenizer(store: TokenStore, tokenizer: Tokenizer) -> None:
    """Raises DataError unless `store` was written with exactly `tokenizer`."""
    if store.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{store.path}: built with tokenizer {store.tokenizer_name!r} (sha256 "
            f"{store.tokenizer_sha256[:12]}), not {tokenizer.name!r} (sha256 "
            f"{tokenizer.sha256[:12]}); use that tokenizer or rebuild the store"
        )


def building_folder(out: Path) -> Path:
    """The folder in which the store `out` is built before it is renamed."""
    out = out.resolve()
    return out.with_name(out.name + ".building") if out.name else out
