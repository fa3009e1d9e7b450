"""Settings of the commands `data` and `tokenizer`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from unipool_jax.config.ranges import Range
from unipool_jax.config.words import Positional
from unipool_jax.data.splits import SplitOrder

DEMO_VOCAB_SIZE = 8192


@dataclass(frozen=True)
class DataRequest:
    """Tokenise files of text into a token store, or check a store.

    An interrupted build goes on where it was when the same command is given again.

        unipool data corpus.jsonl.gz out=stores/corpus tokenizer=gpt2
        unipool data pile/*.jsonl.zst out=stores/pile tokenizer=gpt2 per_file=true
        unipool data verify=stores/corpus
    """

    files: Annotated[tuple[str, ...], Positional()] = ()
    """Files (.txt, .text, .md, .markdown, .rst, .jsonl with or without .gz, .zst or .xz, .parquet), folders of them, or
    patterns."""
    out: str | None = None
    """Store to build."""
    tokenizer: str = "gpt2"
    """`bytes`, `demo`, `gpt2`, or the path of a tokenizer.json."""
    split: tuple[float, ...] = (969.0, 30.0, 1.0)
    """Weights of the train, valid and test splits, by document."""
    split_order: SplitOrder = "contiguous"
    """Whether splits are consecutive ranges of documents or take them in turn."""
    field: str = "text"
    """JSON field or parquet column that holds the text."""
    per_file: bool = False
    """Build one store per file, OUT/NAME, each with its own split (as for the Pile)."""
    workers: Annotated[int | None, Range(1, 4096)] = None
    """Processes that tokenize; null is one per CPU."""
    progress: bool = True
    """Show a progress bar."""
    verify: str | None = None
    """Instead of building, check every byte of this store."""

    def problems(self) -> Iterator[str]:
        """What is missing, and what does not go together."""
        if self.verify is not None and (self.files or self.out):
            yield f"verify={self.verify}: checks a store and builds none; leave files and out= out"
        elif self.verify is None and not (self.files and self.out):
            yield "give files and out=FOLDER to build a store (or verify=FOLDER to check one)"


@dataclass(frozen=True, kw_only=True)
class TokenizerRequest:
    """Train a byte-level BPE tokenizer; without files, the one shipped with the demo corpus.

    Give its file to `unipool data` as tokenizer, and to `unipool train` as data.tokenizer.

        unipool tokenizer out=tokenizer.json
        unipool tokenizer corpus/*.jsonl.gz vocab_size=32768 out=my.json
    """

    files: Annotated[tuple[str, ...], Positional()] = ()
    """Files, folders or patterns, as for `unipool data`; none is the demo corpus."""
    out: str
    """File to write, for example tokenizer.json."""
    vocab_size: Annotated[int, Range(257, 4_194_304)] = DEMO_VOCAB_SIZE
    """Entries: 256 bytes, the end of a document, and merges."""
    field: str = "text"
    """JSON field or parquet column that holds the text."""
