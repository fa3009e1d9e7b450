"""The layout of a token store on disk, and file operations that keep it consistent.

    STORE/
      manifest.json          written last; a folder without it is not a store. Has the sha256 of the other files
                             and of itself
      document_offsets.npy   int64 [D+1]: document d is tokens offsets[d] .. offsets[d+1]-1
      tokens/                zarr3 array of uint16 or uint32, sharded, zstd, crc32c per chunk
      tokenizer.json         only for a tokenizer that is not built in

During a build the folder is called `STORE.building` and also holds `journal.json` and
`lengths.bin`, from which an interrupted build resumes.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from unipool_jax.config import files
from unipool_jax.data.errors import DataError

FORMAT = "unipool token store"
VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest_sha256"
OFFSETS = "document_offsets.npy"
TOKENS = "tokens"
TOKENIZER = "tokenizer.json"
ARRAY_METADATA = "tokens/zarr.json"

# A random read decompresses one chunk; a shard is one file, and what a resumed build repeats at most.
CHUNK_TOKENS = 1 << 13
SHARD_TOKENS = 1 << 24
_CACHE_BYTES = 1 << 26


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def open_array(folder: Path, dtype: np.dtype[Any], shard_tokens: int, *, write: bool) -> tensorstore.TensorStore:
    """The `tokens` array in `folder`; with `write` it is created if it does not exist.

    It is created far longer than needed, because its length is known only at the end.
    """
    try:
        files.check_name((folder / TOKENS).resolve())
    except files.FileError as error:
        raise DataError(str(error)) from error
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    checksum = {"name": "crc32c"}
    sharding = {
        "chunk_shape": [CHUNK_TOKENS],
        "codecs": [little_endian, {"name": "zstd", "configuration": {"level": 3}}, checksum],
        "index_codecs": [little_endian, checksum],
    }
    spec: dict[str, Any] = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{(folder / TOKENS).resolve()}/"},
        "metadata": {
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_tokens]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
        # Write chunks of zeros as well: a missing file would look like a lost shard.
        "store_data_equal_to_fill_value": True,
    }
    if write:
        spec["metadata"]["shape"] = [1 << 48]
        if (folder / TOKENS / "zarr.json").exists():
            del spec["metadata"]["shape"]
        return tensorstore.open(spec, open=True, create=True).result()
    # A finished store never changes, so cached data need not be revalidated.
    spec |= {"recheck_cached_data": False, "recheck_cached_metadata": False}
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    return tensorstore.open(spec, open=True, read=True, context=context).result()


def shard_path(folder: Path, index: int) -> Path:
    """File of shard `index`."""
    return folder / TOKENS / "c" / str(index)


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_record(path: Path) -> dict[str, Any]:
    """What a manifest says about a file."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """Hash of a manifest without its own hash."""
    return json_sha256({key: value for key, value in manifest.items() if key != MANIFEST_HASH})


def json_sha256(value: Any) -> str:
    """sha256 of a JSON value, in hexadecimal; independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a store.

    Raises:
      DataError: unreadable or not a JSON object.
    """
    try:
        return files.read_json(path, "rebuild the store")
    except files.FileError as error:
        raise DataError(str(error)) from error


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Holds an operating-system lock on `path`, waiting for it; gone when the process is.

    The file is removed at the end. Whoever waited for a file that is no longer the one at `path`
    tries again, so removal never lets two holders in.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            held = os.fstat(descriptor)
            try:
                current = os.stat(path)
            except FileNotFoundError:
                continue
            if (held.st_dev, held.st_ino) != (current.st_dev, current.st_ino):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)
