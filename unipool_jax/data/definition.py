"""What a `tokenizer.json` says, and the changes that make it keep the promises of `Tokenizer`.

A definition is the parsed file: nested plain dictionaries, in the format of the `tokenizers` package.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers

from unipool_jax.config.ranges import RANGES
from unipool_jax.data.errors import DataError

Definition = dict[str, Any]

_MAX_IDS = int(RANGES["model.vocab_size"].high)
# No text holds this: noncharacters are not interchanged.
_UNSPELLED = "\ufdd0\ufdd1\ufdd2\ufdd3"
_SPACE = "\u2581"


def parse_definition(name: str, content: bytes) -> tuple[tokenizers.Tokenizer, Definition]:
    """The tokenizer of a `tokenizer.json`, and its definition with the fields that the file leaves to their defaults.

    Raises:
      DataError: not a tokenizer.json, ids that the package would change, two tokens with one id, or ids larger than
        those of any vocabulary.
    """
    refused = f"{name}: not a tokenizer.json of the tokenizers package"
    try:
        definition = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{refused} ({error})") from error
    if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
        raise DataError(f"{refused} (it has no model)")
    core = load_core(name, definition)
    tokens = core.get_vocab(with_added_tokens=True)
    if tokens and max(tokens.values()) >= _MAX_IDS:
        raise DataError(f"{name}: token id {max(tokens.values())} is too large; ids go up to {_MAX_IDS - 1}")
    names = {index: token for token, index in tokens.items()}
    if len(names) < len(tokens):
        token, index = next((token, index) for token, index in tokens.items() if names[index] != token)
        raise DataError(f"{name}: tokens {token!r} and {names[index]!r} have one id, {index}; give each its own")
    for added in definition.get("added_tokens") or []:
        if tokens.get(added["content"]) != added["id"]:
            raise DataError(
                f"{name}: added token {added['content']!r} has id {added['id']}, but the tokenizers package gives it "
                f"{tokens.get(added['content'])}; number added tokens from the end of the vocabulary without gaps"
            )
    for key in ("normalizer", "pre_tokenizer", "decoder"):
        component = getattr(core, key)
        definition[key] = None if component is None else json.loads(component.__getstate__())
    definition["model"]["type"] = type(core.model).__name__
    return core, definition


def load_core(name: str, definition: Definition) -> tokenizers.Tokenizer:
    """The tokenizer that `definition` describes; raises DataError if the package refuses it."""
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(definition))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the package raises bare Exception, or a panic, which is no Exception
        raise DataError(f"{name}: not a tokenizer.json of the tokenizers package ({error})") from error


def repaired(definition: Definition, end: str) -> Definition:
    """`definition` such that encoding is deterministic and decoding inverts it.

    Dropout is off. The end token `end` is special, so that the package does not look for it in texts. Where a decoder
    is missing, it is the one that belongs to the pre-tokenizer or model.
    """
    model = definition["model"] | ({"dropout": None} if definition["model"].get("dropout") else {})
    added = [
        token | {"special": True} if token.get("content") == end else token
        for token in definition.get("added_tokens") or []
    ]
    decoder = definition.get("decoder") or _missing_decoder(definition)
    return definition | {"model": model, "added_tokens": added, "decoder": decoder}


def _missing_decoder(definition: Definition) -> Definition | None:
    model = definition["model"]
    for component in components(definition.get("pre_tokenizer")):
        if component["type"] in ("ByteLevel", "Metaspace"):
            return component
    if model.get("end_of_word_suffix"):
        return {"type": "BPEDecoder", "suffix": model["end_of_word_suffix"]}
    if model.get("type") == "WordPiece":
        return {"type": "WordPiece", "prefix": model.get("continuing_subword_prefix", "##"), "cleanup": False}
    # Words of a WordLevel model are joined by spaces, which is what the package does without a decoder.
    return {"type": "Fuse"} if model.get("type") in ("BPE", "Unigram") else None


def unspelled(definition: Definition, token: str) -> Definition:
    """`definition` with another spelling of `token`, under its old id, that no text has.

    Text that spells the token is then encoded as the characters that it is made of. Merges that make the token or
    start from it are left out. A token that stands for unknown text does so no longer.
    """
    changed = copy.deepcopy(definition)
    model, other = changed["model"], _UNSPELLED + token
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {other if piece == token else piece: index for piece, index in vocab.items()}
    elif vocab:
        model["vocab"] = [[other if piece == token else piece, score] for piece, score in vocab]
        if model.get("unk_id") is not None and vocab[model["unk_id"]][0] == token:
            model["unk_id"] = None
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [
            [left, right] for left, right in pairs if token not in (left, right, left + right, left + right[prefix:])
        ]
    if model.get("unk_token") == token:
        # Only BPE can do without; the other models then refuse text that they do not know.
        model["unk_token"] = None if model.get("type") == "BPE" else _UNSPELLED
    changed["added_tokens"] = [
        added | {"content": other} if added.get("content") == token else added
        for added in changed.get("added_tokens") or []
    ]
    return changed


def components(component: Definition | None) -> Iterator[Definition]:
    """The normalizers, pre-tokenizers or decoders of a component, with sequences flattened."""
    if component is None:
        return
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in component:
            for part in component[key]:
                yield from components(part)
            return
    yield component


def component_types(component: Definition | None) -> list[str]:
    """Type names of `components`."""
    return [part["type"] for part in components(component)]


def is_byte_level(definition: Definition) -> bool:
    """Whether tokens spell one byte per character."""
    return "ByteLevel" in component_types(definition.get("decoder"))


def is_lossless(definition: Definition) -> bool:
    """Whether any text is the concatenation of its tokens, byte for byte: a proof, not a trial.

    True of byte-level BPE that changes and removes nothing before, and has a token for every byte.
    """
    model, before = definition["model"], list(components(definition.get("pre_tokenizer")))
    return (
        model.get("type") == "BPE"
        and definition.get("normalizer") is None
        and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
        and component_types(definition.get("decoder")) == ["ByteLevel"]
        and [part["type"] for part in before[-1:]] == ["ByteLevel"]
        and not any(part.get("add_prefix_space") or part.get("behavior") == "Removed" for part in before)
        and {part["type"] for part in before} <= {"ByteLevel", "Digits", "Punctuation", "Split"}
        and set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) <= model["vocab"].keys()
        and not any(token["lstrip"] or token["rstrip"] for token in _matched(definition))
    )


def _matched(definition: Definition) -> list[Definition]:
    """Added tokens that are looked for in texts."""
    return [token for token in definition.get("added_tokens") or [] if not token["special"]]


def piece_bytes(core: tokenizers.Tokenizer, definition: Definition, vocab_size: int, end: int) -> np.ndarray | None:
    """UTF-8 bytes of text that each token stands for, int32 `[vocab_size]`; None if tokens are not pieces of the text.

    Byte-level tokens spell one byte per character; byte-fallback tokens are `<0xNN>` or text with U+2581 for a space.
    A token for unknown text has 0 bytes, as has the end token. A document whose tokens add up to its own bytes lost
    nothing; whether they do is for the caller to count, unless `is_lossless`.
    """
    model = definition["model"]
    inserts = any(
        part.get("add_prefix_space") or part.get("prepend_scheme", "never") != "never" or part["type"] == "Prepend"
        for part in [*components(definition.get("pre_tokenizer")), *components(definition.get("normalizer"))]
    )
    if (
        model.get("type") not in ("BPE", "Unigram")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or inserts
        or not all(map(_keeps_text, components(definition.get("normalizer"))))
    ):
        return None
    byte_level = is_byte_level(definition)
    added = {token["id"] for token in definition.get("added_tokens") or []}
    lengths = np.zeros(vocab_size, np.int32)
    for token, index in core.get_vocab(with_added_tokens=True).items():
        if index in added:
            lengths[index] = len(token.encode())
        elif byte_level:
            lengths[index] = len(token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            lengths[index] = 1
        else:
            lengths[index] = len(token.replace(_SPACE, " ").encode())
    unknown = unknown_id(core, definition)
    lengths[[end] if unknown is None else [end, unknown]] = 0
    return lengths


def _keeps_text(normalizer: Definition) -> bool:
    """Whether a normalizer changes spellings only: canonical composition, and U+2581 for a space."""
    spaces = normalizer.get("pattern") == {"String": " "} and normalizer.get("content") == _SPACE
    return normalizer["type"] == "NFC" or (normalizer["type"] == "Replace" and spaces)


def unknown_id(core: tokenizers.Tokenizer, definition: Definition) -> int | None:
    """Id of the token that stands for unknown text, if there is one."""
    model = definition["model"]
    if model.get("type") == "Unigram":
        return model.get("unk_id")
    token = model.get("unk_token")
    return None if token is None else core.token_to_id(token)


def has_patterns(definition: Definition) -> bool:
    """Whether regular expressions of the definition itself run over texts."""
    parts = [*components(definition.get("normalizer")), *components(definition.get("pre_tokenizer"))]
    return any("Regex" in part["pattern"] for part in parts if isinstance(part.get("pattern"), dict))
