"""Text to token ids and back, offline.

Four kinds, by name: `bytes` (no vocabulary file), `demo` (8192-entry byte-level BPE shipped with
the demo corpus), `gpt2` (50257, files shipped), or the path of any local `tokenizer.json`.

Text is data: a document that spells an end-of-document token (`<|endoftext|>`) is encoded as the
characters it is made of and never yields that token's id, whatever kind of model has it among its pieces.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from unipool_jax.data.assets import read_asset
from unipool_jax.data.definition import (
    Definition,
    has_patterns,
    is_lossless,
    load_core,
    parse_definition,
    piece_bytes,
    repaired,
    unknown_id,
    unspelled,
)
from unipool_jax.data.errors import DataError
from unipool_jax.data.time_limit import within, without_stderr

END_OF_TEXT = "<|endoftext|>"
BUILT_IN = ("bytes", "demo", "gpt2")

ENCODING = "no text makes the end token; losses are counted"
"""What stores of a tokenizer.json promise since this version; cached stores of earlier ones are built again."""

# Names of the end-of-document token in published tokenizer.json files, most specific first.
_EOD_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")

# Texts on which regular expressions backtrack: repetitions that cannot go on to the end.
_REPETITIONS = tuple(unit * 1000 + "!x" for unit in ("a", "ab", "A", " ", "\n", "1", "-", "\u00e9", "a "))

# Encoding a text may take this long, and a second more for every so many characters: far longer than it needs.
_SECONDS, _CHARACTERS_PER_SECOND = 60.0, 20_000

# Characters that the package gets at a time, as it takes over a hundred bytes of memory for each. A longer text is
# encoded in parts, which are cut where common pre-tokenizers end a token: with a line, else before the space of a word.
_PART = 1 << 21
_CUTS = (re.compile(r"(?<=\S)\n(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))


class TokenizerError(DataError):
    """A text that a tokenizer cannot encode."""


class SlowTokenizerError(TokenizerError):
    """A text that a tokenizer did not encode in time."""


class Tokenizer:
    """Text to ids.

    Attributes:
      name: the argument of `load_tokenizer`.
      vocab_size: ids are `0 .. vocab_size-1`.
      eod: id of the end-of-document token.
      sha256: hash of the definition; tokenizers with equal hashes give the same ids.
      lossless: whether every text is the concatenation of its tokens, byte for byte. Of texts of other tokenizers,
        `losses.measure` counts what is lost.
      piece_bytes: `[vocab_size]` int32, UTF-8 bytes of text per token (0 for eod); None where tokens are not pieces of
        the text, for example where a tokenizer inserts a space or changes letters. Unless `lossless`, its sum is the
        byte count of some texts and not of others.
      definition: content of the `tokenizer.json`, None for built-in tokenizers.
    """

    name: str
    vocab_size: int
    eod: int
    sha256: str
    lossless: bool
    piece_bytes: np.ndarray | None
    definition: bytes | None = None

    @property
    def token_bytes(self) -> np.ndarray | None:
        """`piece_bytes` where the byte count of every text is their sum, else None."""
        return self.piece_bytes if self.lossless else None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array of ids per text, without the end-of-document token.

        Raises:
          TokenizerError: a text cannot be encoded, or not in reasonable time.
        """
        raise NotImplementedError

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        raise NotImplementedError

    def decode_after(self, before: Sequence[int] | np.ndarray, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids` where they follow `before`.

        A decoder drops the space before the first word, and cannot read half of a letter: the two are decoded together.
        """
        start, whole = self.decode(before), self.decode(np.concatenate([before, ids]))
        # They differ where a decoder treats the end of a text differently, or `before` ends within a letter.
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(start, whole, strict=False))
        return whole[sum(1 for _ in same) :]


class ByteTokenizer(Tokenizer):
    """Ids 0-255 are UTF-8 bytes, 256 ends a document."""

    name = "bytes"
    vocab_size = 257
    eod = 256
    sha256 = hashlib.sha256(b"UTF-8 bytes, 256 = end of document").hexdigest()
    lossless = True

    def __init__(self) -> None:
        self.piece_bytes = np.append(np.ones(256, np.int32), np.int32(0))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64).reshape(-1)
        pieces = np.split(ids, np.flatnonzero(ids == self.eod))
        texts = [piece[piece != self.eod].astype(np.uint8).tobytes() for piece in pieces]
        return END_OF_TEXT.join(text.decode(errors="replace") for text in texts)


class VocabularyTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` package, with a known end-of-document token."""

    def __init__(
        self,
        name: str,
        core: tokenizers.Tokenizer,
        definition: Definition,
        eod: int,
        sha256: str,
        content: bytes | None = None,
    ):
        self._core = _for_text(core)
        self._definition = definition
        self.name = name
        self.vocab_size = max(core.get_vocab(with_added_tokens=True).values()) + 1
        self.eod = eod
        self.sha256 = sha256
        self.definition = content
        self.lossless = is_lossless(definition)

    @functools.cached_property
    def piece_bytes(self) -> np.ndarray | None:  # type: ignore[override]
        return piece_bytes(self._core, self._definition, self.vocab_size, self.eod)

    @functools.cached_property
    def unknown(self) -> int | None:
        """Id of the token that stands for unknown text, if there is one."""
        return unknown_id(self._core, self._definition)

    @functools.cached_property
    def _unspelled(self) -> tokenizers.Tokenizer:
        """The same tokenizer where no text spells the end token."""
        end = self._core.id_to_token(self.eod)
        assert end is not None
        return _for_text(load_core(self.name, unspelled(self._definition, end)))

    def check_patterns(self) -> None:
        """Raises SlowTokenizerError if a regular expression of the definition backtracks on plain repetitions."""
        if not has_patterns(self._definition):
            return
        limit = _SECONDS / 6
        for text in _REPETITIONS:
            try:
                with without_stderr():
                    within(limit, lambda text=text: self._core.encode_batch_fast([text]))  # type: ignore[misc]
            except TimeoutError as error:
                raise self._slow(len(text), f"more than {limit:.0f} seconds") from error
            except BaseException as error:
                if "retry-limit" in str(error):
                    raise self._slow(len(text), "more steps than the tokenizers package allows") from error
                if not isinstance(error, Exception):
                    raise
                # Characters without a token: found where a text has them.

    def _slow(self, size: int, how: str) -> "SlowTokenizerError":
        return SlowTokenizerError(
            f"tokenizer {self.name}: {size:,} characters took {how}; simplify the regular expressions in its "
            "pre_tokenizer and normalizer, which backtrack without end on this text"
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if any(len(text) > _PART for text in texts):
            return [np.concatenate([self.encode_batch([part])[0] for part in _parts(text)]) for text in texts]
        rows = self._encoded(self._core, texts)
        # The package keeps added tokens out of texts, but a model may have the end token among its pieces.
        spelled = [number for number, row in enumerate(rows) if (row == self.eod).any()]
        if spelled:
            for number, row in zip(
                spelled, self._encoded(self._unspelled, [texts[number] for number in spelled]), strict=True
            ):
                rows[number] = row
                if (row == self.eod).any():
                    raise TokenizerError(f"tokenizer {self.name}: makes its end token of this text; use another one")
        return rows

    def _encoded(self, core: tokenizers.Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
        size = sum(map(len, texts))
        limit = _SECONDS + size / _CHARACTERS_PER_SECOND
        try:
            # Of the package's ways to encode, the one that releases the interpreter lock.
            encodings = within(limit, lambda: core.encode_batch_fast(list(texts), add_special_tokens=False))
        except TimeoutError as error:
            raise self._slow(size, f"more than {limit:.0f} seconds") from error
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:  # the package raises bare Exception, or a panic, which is no Exception
            raise TokenizerError(f"tokenizer {self.name}: cannot encode this text ({error})") from error
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._core.decode(np.asarray(ids).reshape(-1).tolist(), skip_special_tokens=False)


def _parts(text: str) -> Iterator[str]:
    """`text` in parts of at most `_PART` characters."""
    start = 0
    while len(text) - start > _PART:
        window = text[start + _PART // 2 : start + _PART + 1]
        found = (max((cut.end() for cut in pattern.finditer(window)), default=None) for pattern in _CUTS)
        end = start + _PART // 2 + next((cut for cut in found if cut is not None), _PART // 2)
        yield text[start:end]
        start = end
    yield text[start:]


def _for_text(core: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """`core`, which then encodes every text in full and as text."""
    core.no_truncation()
    core.no_padding()
    core.encode_special_tokens = True  # a special token spelled in a text is text
    return core


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer `name`: `bytes`, `demo`, `gpt2` or the path of a `tokenizer.json`.

    Example: `load_tokenizer("gpt2").encode_batch(["Hello world"])` gives `[[15496, 995]]`.

    Raises:
      DataError: an unknown name, an unreadable file, or no end-of-document token.
    """
    if name in BUILT_IN:
        return _load_built_in(name)
    path = Path(name)
    if not path.is_file():
        raise DataError(
            f"tokenizer {name!r}: choose one of {', '.join(BUILT_IN)} or give the path of an existing tokenizer.json"
        )
    return parse_tokenizer(name, path.read_bytes())


@functools.cache
def _load_built_in(name: str) -> Tokenizer:
    if name == "bytes":
        return ByteTokenizer()
    if name == "demo":
        tokenizer = parse_tokenizer(name, read_asset("demo_tokenizer.json"))
        tokenizer.definition = None  # built in, so a store need not include it
        return tokenizer
    encoder = read_asset("gpt2_encoder.json")
    merges = read_asset("gpt2_vocab.bpe")
    vocab: dict[str, int] = json.loads(encoder)
    lines = merges.decode().split("\n")[1:]  # the first line names the format's version
    pairs = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=pairs))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    definition = json.loads(core.to_str())
    sha256 = hashlib.sha256(encoder + merges).hexdigest()
    return VocabularyTokenizer(name, core, definition, vocab[END_OF_TEXT], sha256)


def parse_tokenizer(name: str, definition: bytes) -> Tokenizer:
    """The tokenizer that the content of a `tokenizer.json` defines; `name` is used in messages.

    Raises:
      DataError: the content cannot be parsed, or has no known end-of-document token.
    """
    core, parsed = parse_definition(name, definition)
    end = next((token for token in _EOD_NAMES if core.token_to_id(token) is not None), None)
    if end is None:
        raise DataError(f"{name}: no end-of-document token; add one of {', '.join(_EOD_NAMES)} to its vocabulary")
    fixed = repaired(parsed, end)
    if fixed != parsed:
        core = load_core(name, fixed)
    eod = core.token_to_id(end)
    assert eod is not None
    tokenizer = VocabularyTokenizer(name, core, fixed, eod, hashlib.sha256(definition).hexdigest(), definition)
    tokenizer.check_patterns()
    return tokenizer
