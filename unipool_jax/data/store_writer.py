"""Writes the token stream of a store shard by shard, so that an interrupted build can resume."""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unipool_jax.config import files
from unipool_jax.data import hashing, store_format
from unipool_jax.data.errors import DataError
from unipool_jax.data.losses import Losses

_JOURNAL = "journal.json"
_LENGTHS = "lengths.bin"
_COUNTS = (
    "documents",
    "empty_documents",
    "text_bytes",
    "changed_documents",
    "lost_characters",
    "inexact_documents",
)

_JOURNAL_FIELDS = {
    "key": str,
    "tokens": int,
    "documents": int,
    "carried": int,
    "shards": list,
    "next": list,
    "inputs": list,
}


class Encoded(NamedTuple):
    """Consecutive records of one input file, tokenized."""

    file: int  # index of the input file
    first: int  # index of the first record within that file
    lengths: np.ndarray  # [n] int64, tokens per record including end of document; 0 if empty
    text_bytes: np.ndarray  # [n] int64, UTF-8 bytes per record
    losses: Losses  # [n]
    tokens: np.ndarray  # [sum(lengths)], the store's dtype


def cannot_write(path: Path, error: Exception) -> DataError:
    """The error for a full disk or missing permission; finished shards are kept."""
    reason = (str(error) or type(error).__name__).splitlines()[0][:300]  # TensorStore tells all that it knows
    return DataError(
        f"{path}: cannot be written ({reason}); free some space or choose another folder, then "
        "repeat the command to resume after the last finished shard"
    )


class StoreWriter:
    """Appends to a store that is being built.

    After every full shard the journal records the shards, the next record of the inputs, and how
    many of that record's tokens are in the last shard. A resumed build starts again from there.

    Args:
      folder: the `.building` folder; created, or resumed if it holds a build with this `key`.
      key: hash of inputs and settings.
      num_files: number of input files.
      dtype: of the stored tokens.
      shard_tokens: tokens per shard, a multiple of `store_format.CHUNK_TOKENS`.

    Raises:
      DataError: `folder` holds shards of a build with another key, or cannot be written.
    """

    def __init__(self, folder: Path, key: str, num_files: int, dtype: np.dtype[Any], shard_tokens: int):
        self.folder = folder
        self._shard_tokens = shard_tokens
        self._dtype = dtype
        self._journal = self._load_journal(key) or {
            "key": key,
            "shards": [],
            "tokens": 0,
            "documents": 0,
            "next": [0, 0],
            "carried": 0,
            "inputs": [dict.fromkeys(_COUNTS, 0) for _ in range(num_files)],
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _LENGTHS).touch()
        os.truncate(folder / _LENGTHS, self._journal["documents"] * 8)
        try:
            self._array = store_format.open_array(folder, dtype, shard_tokens, write=True)
        except DataError:
            raise
        except Exception as error:  # as in `_write_shard`
            raise cannot_write(folder, error) from error
        self._skip = self._journal["carried"]
        self._waiting: list[Encoded] = []
        self._waiting_tokens = 0

    def _load_journal(self, key: str) -> dict[str, Any] | None:
        path = self.folder / _JOURNAL
        journal = store_format.read_json(path) if path.exists() else None
        if journal is not None:
            files.check_fields(journal, path, _JOURNAL_FIELDS, f"delete {self.folder} to start again")
        if journal and journal["key"] == key:
            return journal
        if journal and journal["shards"]:
            raise DataError(
                f"{self.folder}: holds an interrupted build from other inputs or settings; "
                "repeat that command to finish it, or delete the folder to start again"
            )
        shutil.rmtree(self.folder, ignore_errors=True)  # holds no finished shard
        return None

    @property
    def next_record(self) -> tuple[int, int]:
        """(file, record) that the caller must append next."""
        file, record = self._journal["next"]
        return file, record

    @property
    def num_tokens(self) -> int:
        """Tokens in finished shards and in memory."""
        return self._journal["tokens"] + self._waiting_tokens

    def append(self, encoded: Encoded) -> None:
        """Adds records, in input order, and writes every shard that becomes full."""
        if self._skip and len(encoded.tokens):
            encoded = encoded._replace(tokens=encoded.tokens[self._skip :])
            self._skip = 0
        self._waiting.append(encoded)
        self._waiting_tokens += len(encoded.tokens)
        while self._waiting_tokens >= self._shard_tokens:
            self._commit(self._shard_tokens)

    def _commit(self, size: int) -> None:
        """Writes the first `size` waiting tokens as the next shard and records it."""
        journal = self._journal
        tokens = np.concatenate([encoded.tokens for encoded in self._waiting])
        self._write_shard(tokens[:size])
        lengths = np.concatenate([encoded.lengths for encoded in self._waiting])
        ends = np.cumsum(lengths) - journal["carried"]
        done = int(np.searchsorted(ends, size, side="right"))
        with (self.folder / _LENGTHS).open("r+b") as file:
            file.seek(journal["documents"] * 8)
            kept = lengths[:done][lengths[:done] > 0].astype("<i8")
            file.write(kept.tobytes())
            file.flush()
            os.fsync(file.fileno())
        journal["tokens"] += size
        journal["documents"] += len(kept)
        journal["carried"] = size - int(ends[done - 1]) if done else journal["carried"] + size
        self._forget(done, tokens[size:])
        files.write_json(self.folder / _JOURNAL, journal)

    def _write_shard(self, tokens: np.ndarray) -> None:
        shards = self._journal["shards"]
        start = len(shards) * self._shard_tokens
        path = store_format.shard_path(self.folder, len(shards))
        try:
            self._array[start : start + len(tokens)].write(tokens).result()
        except Exception as error:  # TensorStore reports a full disk as one of several types
            raise cannot_write(path, error) from error
        shards.append(store_format.file_record(path) | {"tokens_sha256": hashing.tokens_sha256(tokens, self._dtype)})

    def _forget(self, done: int, tokens: np.ndarray) -> None:
        """Removes the first `done` waiting records and counts them; `tokens` are those that remain."""
        waiting: list[Encoded] = []
        for encoded in self._waiting:
            here = min(done, len(encoded.lengths))
            done -= here
            counts = self._journal["inputs"][encoded.file]
            lost = encoded.losses.part(slice(here))
            found = {
                "documents": np.count_nonzero(encoded.lengths[:here]),
                "empty_documents": np.count_nonzero(encoded.lengths[:here] == 0),
                "text_bytes": encoded.text_bytes[:here].sum(),
                "changed_documents": lost.changed.sum(),
                "lost_characters": lost.characters.sum(),
                "inexact_documents": lost.inexact.sum(),
            }
            # A build that an older version began has not counted all of these, and leaves them unknown.
            counts |= {name: counts[name] + int(value) for name, value in found.items() if name in counts}
            if here:
                self._journal["next"] = [encoded.file, encoded.first + here]
            if here < len(encoded.lengths):
                rest = encoded.lengths[here:], encoded.text_bytes[here:], encoded.losses.part(slice(here, None))
                waiting.append(Encoded(encoded.file, encoded.first + here, *rest, tokens[:0]))
        if waiting:
            # Only the total of the waiting tokens matters, so the first entry can hold all of them.
            waiting[0] = waiting[0]._replace(tokens=tokens)
        self._waiting = waiting
        self._waiting_tokens = len(tokens)

    def finish(self, manifest: dict[str, Any]) -> None:
        """Writes the last shard, the offsets and finally the manifest.

        Args:
          manifest: the caller's part of it (tokenizer, split, input names); counts, sizes and
            hashes are added.

        Raises:
          DataError: there are no tokens, or the disk is full.
        """
        num_tokens = self.num_tokens
        if num_tokens == 0:
            raise DataError("no text in the input: every document is empty")
        if self._waiting_tokens:
            self._commit(self._waiting_tokens)
        elif self._waiting:  # only empty documents
            self._forget(sum(len(encoded.lengths) for encoded in self._waiting), np.empty(0))
        try:
            self._array.resize(exclusive_max=[num_tokens], resize_metadata_only=True).result()
        except Exception as error:
            raise cannot_write(self.folder / store_format.TOKENS, error) from error
        lengths = np.fromfile(self.folder / _LENGTHS, "<i8")
        offsets_path = self.folder / store_format.OFFSETS
        with offsets_path.open("wb") as file:
            np.save(file, np.concatenate([[0], np.cumsum(lengths)]), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        journal = self._journal
        document = {
            "format": store_format.FORMAT,
            "version": store_format.VERSION,
            **manifest,
            "dtype": self._dtype.name,
            "tokens": num_tokens,
            "documents": journal["documents"],
            "text_bytes": sum(counts["text_bytes"] for counts in journal["inputs"]),
            "inputs": [known | counted for known, counted in zip(manifest["inputs"], journal["inputs"], strict=True)],
            "build_key": journal["key"],
            "shard_tokens": self._shard_tokens,
            "shards": journal["shards"],
            "document_offsets": store_format.file_record(offsets_path),
            "array_metadata": store_format.file_record(self.folder / store_format.ARRAY_METADATA),
        }
        document[store_format.MANIFEST_HASH] = store_format.manifest_sha256(document)
        files.write_json(self.folder / store_format.MANIFEST, document, indent=1)


def publish(folder: Path, out: Path) -> None:
    """Renames the finished `folder` to `out`, atomically."""
    for name in (_JOURNAL, _LENGTHS):
        (folder / name).unlink(missing_ok=True)
    os.rename(folder, out)
    files.sync_folder(out.parent)
