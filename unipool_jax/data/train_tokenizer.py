"""Trains a byte-level BPE tokenizer; without files, the built-in one of the demo corpus.

python -m unipool_jax.data.train_tokenizer --out tokenizer.json
python -m unipool_jax.data.train_tokenizer corpus/*.jsonl.gz --vocab-size 32768 --out my.json
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from unipool_jax.data.assets import demo_corpus_path
from unipool_jax.data.errors import DataError
from unipool_jax.data.readers import read_texts
from unipool_jax.data.splits import Split, split_documents
from unipool_jax.data.tokenizer import END_OF_TEXT

DEMO_VOCAB_SIZE = 8192
# Every twentieth address is held out for each of valid and test, so each split spans 1790-2021.
DEMO_SPLIT: Split = (18.0, 1.0, 1.0)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """The `tokenizer.json` of a byte-level BPE with `vocab_size` entries, `<|endoftext|>` first.

    The end-of-document token is an ordinary vocabulary entry that no merge produces. As an "added
    token" it would be recognized inside the text of a document.
    """
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    definition = json.loads(core.to_str())
    definition["added_tokens"] = []
    return json.dumps(definition, ensure_ascii=False, separators=(",", ":")).encode()


def demo_training_texts() -> list[str]:
    """The documents of the demo corpus's training split."""
    texts = list(read_texts([demo_corpus_path()]))
    return [texts[i] for i in split_documents(len(texts), DEMO_SPLIT, "interleaved", "train")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code (0, or 2 after an error)."""
    parser = argparse.ArgumentParser(
        prog="python -m unipool_jax.data.train_tokenizer", description=__doc__.split("\n")[0]
    )
    parser.add_argument("files", nargs="*", help="text, jsonl or parquet (default: demo corpus)")
    parser.add_argument("--out", required=True, type=Path, help="tokenizer.json to write")
    parser.add_argument("--vocab-size", type=int, default=DEMO_VOCAB_SIZE)
    parser.add_argument("--field", default="text", help="field or column that holds the text")
    options = parser.parse_args(arguments)
    try:
        if options.vocab_size < 257:
            raise DataError(f"--vocab-size {options.vocab_size}: must be at least 257 (256 bytes, 1 end of document)")
        paths = [Path(file) for file in options.files]
        texts = read_texts(paths, options.field) if paths else demo_training_texts()
        options.out.write_bytes(train_tokenizer(texts, options.vocab_size))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
