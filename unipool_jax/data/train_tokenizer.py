"""`unipool tokenizer`: trains a byte-level BPE tokenizer; without files, the one shipped with the demo corpus."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from unipool_jax.config.files import write_atomically
from unipool_jax.data.assets import demo_corpus_path
from unipool_jax.data.inputs import find_inputs
from unipool_jax.data.readers import read_texts
from unipool_jax.data.requests import TokenizerRequest
from unipool_jax.data.splits import Split, split_documents
from unipool_jax.data.tokenizer import END_OF_TEXT, parse_tokenizer

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


def tokenizer_command(request: TokenizerRequest) -> int:
    """Train a tokenizer and write it.

    Raises:
      DataError, FileError: with what to do about it.
    """
    inputs = find_inputs(request.files)
    if (note := inputs.note()) is not None:
        print(note, file=sys.stderr)
    texts = read_texts(inputs.files, request.field) if inputs.files else demo_training_texts()
    trained = train_tokenizer(texts, request.vocab_size)
    write_atomically(Path(request.out), trained)
    size = parse_tokenizer(request.out, trained).vocab_size
    few = "" if size == request.vocab_size else f"; the text gave no more than these of vocab_size={request.vocab_size}"
    print(f"wrote {request.out}: {size:,} entries{few}")
    return 0
