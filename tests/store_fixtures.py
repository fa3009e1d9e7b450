"""A small corpus, and stores built from it, for the tests of token stores."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unipool_jax.data import store_format
from unipool_jax.data.store_reader import TokenStore
from unipool_jax.data.token_store import build_store

Corpus = tuple[list[Path], list[str]]  # files and their non-empty texts

SHARD = store_format.CHUNK_TOKENS  # the smallest shard, so that small inputs have several


def build(files: Sequence[Path], out: str | Path, tokenizer: str = "bytes", **options: Any) -> TokenStore:
    return build_store(files, out, tokenizer, progress=False, **{"shard_tokens": SHARD, **options})


def make_corpus(folder: Path) -> Corpus:
    """Three files with empty, tiny and shard-crossing documents, and their non-empty texts."""
    random = np.random.RandomState(0)
    sizes = [0, 1, 300, 20_000, 0, 0, 5000, SHARD - 1, 700, 0], [9000, 0, 1, 1, 12_000, 0], [0, 40]
    files, texts = [], []
    for index, lengths in enumerate(sizes):
        documents = ["".join(map(chr, random.randint(97, 123, n))) for n in lengths]
        path = folder / f"{index}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        files.append(path)
        texts += [text for text in documents if text]
    return files, texts


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
