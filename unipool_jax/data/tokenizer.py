"""Text to token ids and back, offline.

Four kinds, by name: `bytes` (no vocabulary file), `demo` (8192-entry byte-level BPE shipped with
the demo corpus), `gpt2` (50257, files shipped), or the path of any local `tokenizer.json`.

Text is data: a document that spells an end-of-document token (`<|endoftext|>`) is encoded as the
characters it is made of and never yields that token's id.
"""

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from unipool_jax.data.assets import read_asset
from unipool_jax.data.errors import DataError

END_OF_TEXT = "<|endoftext|>"
BUILT_IN = ("bytes", "demo", "gpt2")

# Names of the end-of-document token in published tokenizer.json files, most specific first.
_EOD_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")

# Texts on which the byte counts of an unknown tokenizer are verified: leading and repeated spaces,
# line ends, control characters, combining marks, four-byte characters, an unassigned code point
# and a spelled-out special token.
_PROBES = (
    "Plain words, 12345 numbers; and punctuation!",
    "  two leading blanks\tand\n\n\nline ends \r\n ",
    "x\x00\x07\x1b\x7f\u00a0\u2028y",
    "na\u00efve e\u0301 \u1e9b\u0323 \ufb01 \u00c5 \uac00 \u6f22\u5b57 \u0639\u0631\u0628\u064a",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1fa\U0001f1f3 \U000e0001 \u0378 \ufffd",
    "<|endoftext|> </s> <unk> \u2581",
)


class Tokenizer:
    """Text to ids.

    Attributes:
      name: the argument of `load_tokenizer`.
      vocab_size: ids are `0 .. vocab_size-1`.
      eod: id of the end-of-document token.
      sha256: hash of the definition; tokenizers with equal hashes give the same ids.
      token_bytes: `[vocab_size]` int32, UTF-8 bytes of text per token (0 for eod), so that the
        byte count of a sequence is a sum; None where no such table is exact (for example, where a
        tokenizer inserts a space before each document).
      definition: content of the `tokenizer.json`, None for built-in tokenizers.
    """

    name: str
    vocab_size: int
    eod: int
    sha256: str
    token_bytes: np.ndarray | None
    definition: bytes | None = None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array of ids per text, without the end-of-document token."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        raise NotImplementedError


class ByteTokenizer(Tokenizer):
    """Ids 0-255 are UTF-8 bytes, 256 ends a document."""

    name = "bytes"
    vocab_size = 257
    eod = 256
    sha256 = hashlib.sha256(b"UTF-8 bytes, 256 = end of document").hexdigest()

    def __init__(self) -> None:
        self.token_bytes = np.append(np.ones(256, np.int32), np.int32(0))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64).reshape(-1)
        pieces = np.split(ids, np.flatnonzero(ids == self.eod))
        texts = [piece[piece != self.eod].astype(np.uint8).tobytes() for piece in pieces]
        return END_OF_TEXT.join(text.decode(errors="replace") for text in texts)


class BpeTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` package, with a known end-of-document token."""

    def __init__(
        self,
        name: str,
        core: tokenizers.Tokenizer,
        eod: int,
        sha256: str,
        definition: bytes | None = None,
    ):
        core.no_truncation()
        core.no_padding()
        core.encode_special_tokens = True  # a special token spelled in a text is text
        self._core = core
        self.name = name
        self.vocab_size = max(core.get_vocab(with_added_tokens=True).values()) + 1
        self.eod = eod
        self.sha256 = sha256
        self.definition = definition

    @functools.cached_property
    def token_bytes(self) -> np.ndarray | None:  # type: ignore[override]
        return _token_bytes(self._core, self.vocab_size, self.eod)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._core.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._core.decode(np.asarray(ids).reshape(-1).tolist(), skip_special_tokens=False)


def _token_bytes(core: tokenizers.Tokenizer, vocab_size: int, eod: int) -> np.ndarray | None:
    """Byte length of every token, or None if summing them does not give the length of a text.

    Byte-level tokens spell one byte per character; byte-fallback tokens are `<0xNN>` or text with
    U+2581 for a space. The table is used only if it is exact on `_PROBES`. A tokenizer that
    normalizes to NFC is compared with the NFC form of the text.
    """
    definition = json.loads(core.to_str())
    byte_level = "ByteLevel" in _component_types(definition.get("decoder"))
    added = {token["id"]: token for token in definition.get("added_tokens") or []}
    if any((t["lstrip"] or t["rstrip"]) and not t["special"] for t in added.values()):
        return None  # such a token absorbs an unknown amount of white space
    lengths = np.zeros(vocab_size, np.int32)
    for token, index in core.get_vocab(with_added_tokens=True).items():
        if index in added:
            lengths[index] = len(token.encode())
        elif byte_level:
            lengths[index] = len(token)
        elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            lengths[index] = 1
        else:
            lengths[index] = len(token.replace("\u2581", " ").encode())
    lengths[eod] = 0
    nfc = _component_types(definition.get("normalizer")) == ["NFC"]
    for probe in _PROBES:
        if not byte_level:
            probe = probe.replace("\u2581", "")  # a space in such a tokenizer, by design
        text = unicodedata.normalize("NFC", probe) if nfc else probe
        ids = core.encode(probe, add_special_tokens=False).ids
        if int(lengths[ids].sum()) != len(text.encode()):
            return None
    return lengths


def _component_types(component: dict[str, Any] | None) -> list[str]:
    """Type names of a normalizer, pre-tokenizer or decoder, with sequences flattened."""
    if component is None:
        return []
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in component:
            return [name for part in component[key] for name in _component_types(part)]
    return [component["type"]]


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
    return BpeTokenizer(name, core, vocab[END_OF_TEXT], hashlib.sha256(encoder + merges).hexdigest())


def parse_tokenizer(name: str, definition: bytes) -> Tokenizer:
    """The tokenizer that the content of a `tokenizer.json` defines; `name` is used in messages.

    Raises:
      DataError: the content cannot be parsed, or has no known end-of-document token.
    """
    try:
        core = tokenizers.Tokenizer.from_str(definition.decode())
    except Exception as error:  # the package raises bare Exception for a bad definition
        raise DataError(f"{name}: not a tokenizer.json of the tokenizers package ({error})") from error
    eods = [core.token_to_id(token) for token in _EOD_NAMES]
    eod = next((index for index in eods if index is not None), None)
    if eod is None:
        raise DataError(f"{name}: no end-of-document token; add one of {', '.join(_EOD_NAMES)} to its vocabulary")
    return BpeTokenizer(name, core, eod, hashlib.sha256(definition).hexdigest(), definition)
