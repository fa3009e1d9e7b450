"""Which text can be read: tokenizer, splits, files and stores."""

from __future__ import annotations

from collections.abc import Iterator

from unipool_jax.config.divisors import next_multiple
from unipool_jax.config.paths import is_dir, is_file, is_path, names_files
from unipool_jax.config.schema import Config

TOKENIZER_SIZES = {"bytes": 257, "demo": 8192, "gpt2": 50257}
"""Vocabulary sizes of the built-in tokenizers; that of a tokenizer.json is checked when it is loaded."""


def vocabulary(config: Config) -> Iterator[str]:
    """Problems of embeddings that are too few for a built-in tokenizer."""
    tokenizer, rows = config.data.tokenizer, config.model.vocab_size
    size = TOKENIZER_SIZES.get(tokenizer)
    if size is not None and rows < size:
        yield (
            f"model.vocab_size={rows}: data.tokenizer={tokenizer} has {size} tokens; "
            f"set model.vocab_size={next_multiple(size, 1024)} or choose another tokenizer"
        )


def tokenizer(config: Config) -> Iterator[str]:
    """Problems of the name or file of the tokenizer."""
    tokenizer = config.data.tokenizer
    if tokenizer not in TOKENIZER_SIZES and not is_file(tokenizer):
        yield (
            f"data.tokenizer={tokenizer!r}: must be one of {', '.join(TOKENIZER_SIZES)} or the path of an existing "
            "tokenizer.json file"
        )


def split(config: Config) -> Iterator[str]:
    """Problems of the weights of the train, valid and test splits."""
    split = config.data.split
    if len(split) != 3 or any(not 0 <= weight <= 1_000_000 for weight in split) or not split[0]:
        yield (
            f"data.split={list(split)}: must be three weights from 0 to 1000000 for train, valid and test, "
            "the first positive; for example data.split=[969,30,1]"
        )


def sources(config: Config) -> Iterator[str]:
    """Problems of the files or stores to read."""
    data = config.data
    # Conversations are read from data.files too.
    kind = "files" if data.source == "conversations" else data.source
    for name, source, choice in (("files", "files", "text"), ("stores", "stores", "pile")):
        paths: tuple[str, ...] = getattr(data, name)
        if paths and kind != source:
            yield (
                f"data.{name}={list(paths)}: unused with data.source={data.source}; "
                f"choose data={choice} (data.source={source}) or remove them"
            )
        if not paths and kind == source:
            yield f"data.{name}=[]: data.source={data.source} needs at least one; set data.{name}=[PATH,...]"
    if kind == "files":
        for path in data.files:
            if not names_files(path):
                yield (
                    f"data.files: {path!r} is not an existing file, a folder of files or a pattern that matches one; "
                    "correct the path or remove it"
                )
    if data.source == "stores":
        for path in data.stores:
            if not (is_dir(path) or (is_file(f"{path}.bin") and is_file(f"{path}.idx"))):
                yield (
                    f"data.stores: {path!r} is neither a folder nor the prefix of {path}.bin and {path}.idx; "
                    "correct the path, or build a store with `unipool data`"
                )


def cache(config: Config) -> Iterator[str]:
    """Problems of the folder for tokens of text files."""
    cache = config.data.cache_dir
    if not is_path(cache):
        yield f"data.cache_dir={cache!r}: must be the path of a folder; for example data.cache_dir=.cache/tokens"
    elif is_file(cache):
        yield f"data.cache_dir={cache!r}: is a file; give the path of a folder"
