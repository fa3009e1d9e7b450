"""Packed conversations in the cache folder, so that a run that starts again does not tokenize them again.

The name of the file is a hash of all that its content comes from: the files' contents, the text of the template, the
tokenizer and the length of a sequence. A changed file gives another name and a moved one does not.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unipool_jax.config.files import FileError, write_atomically
from unipool_jax.data import store_format
from unipool_jax.data.conversation_store import Packed, pack_conversations
from unipool_jax.data.errors import DataError
from unipool_jax.data.hashing import REMEMBERED, remembered_sha256
from unipool_jax.data.templates import template_source
from unipool_jax.data.tokenizer import ENCODING, Tokenizer

VERSION = 1
"""Of the layout of the file, and of how examples are made and packed."""


def cached_conversations(
    files: Sequence[Path], template: str, size: int, tokenizer: Tokenizer, cache_dir: Path
) -> Packed:
    """The packed conversations in `files`, read from the cache or made and written there.

    A cache that cannot be written is not used, and a damaged file is made anew. Of several processes one writes.

    Args:
      files, template, size, tokenizer: as of `pack_conversations`.
      cache_dir: `data.cache_dir`.

    Raises:
      DataError: as `pack_conversations`.
    """
    try:
        hashes = [remembered_sha256(file, cache_dir / REMEMBERED) for file in files]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot open ({error.strerror})") from error
    parts = [VERSION, ENCODING, hashes, template_source(template), tokenizer.sha256, size]
    path = cache_dir / f"conversations-{store_format.json_sha256(parts)[:24]}.npz"
    if (found := _read(path)) is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with store_format.exclusive_lock(path.with_name(path.name + ".lock")):
            if (found := _read(path)) is None:
                found = pack_conversations(files, template, size, tokenizer)
                write_atomically(path, _content(found))
            return found
    except (OSError, FileError):
        return found or pack_conversations(files, template, size, tokenizer)


def _content(packed: Packed) -> bytes:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        tokens=packed.tokens_PS,
        counted=np.packbits(packed.counted_PS, axis=1),
        examples=np.array([packed.examples, packed.left_out]),
    )
    return buffer.getvalue()


def _read(path: Path) -> Packed | None:
    """What a file holds; None without one or if it is damaged, which check sums in it tell."""
    try:
        with np.load(path) as arrays:
            tokens_PS = arrays["tokens"]
            counted_PS = np.unpackbits(arrays["counted"], axis=1, count=tokens_PS.shape[1]).astype(bool)
            examples, left_out = arrays["examples"].tolist()
            return Packed(tokens_PS, counted_PS, examples, left_out)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
