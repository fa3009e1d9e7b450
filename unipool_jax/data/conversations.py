"""Conversations from JSON lines, as prompts and responses.

A conversation of n responses is n examples: each response with everything before it as its prompt. So a response is
predicted from exactly the tokens that sampling starts from, counts once, and ends with the end-of-document token, at
which sampling stops.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unipool_jax.data.errors import DataError
from unipool_jax.data.losses import check_not_empty
from unipool_jax.data.readers import DocumentFile, file_format
from unipool_jax.data.templates import Message, load_template
from unipool_jax.data.tokenizer import Tokenizer, TokenizerError

RESPONDS = "assistant"
"""The role whose messages are responses."""

PAIR = (("user", "prompt"), (RESPONDS, "response"))
"""Roles of a line that has a prompt and a response."""


class Exchange(NamedTuple):
    """One response and what comes before it."""

    messages: tuple[Message, ...]
    response: str
    place: str
    """File and line, for messages."""


class Example(NamedTuple):
    """One exchange in tokens."""

    prompt: np.ndarray
    """int32, at least one."""
    response: np.ndarray
    """int32; the last one is the end-of-document token."""
    exchange: Exchange


def read_exchanges(files: Sequence[Path]) -> Iterator[Exchange]:
    """The exchanges of `.jsonl` files (also compressed), in order.

    A line is `{"messages": [{"role": ..., "content": ...}, ...]}` or `{"prompt": ..., "response": ...}`.

    Raises:
      DataError: another format, a line that is neither, or a conversation without a response.
    """
    for path in files:
        if not file_format(path).startswith(".jsonl"):
            raise DataError(f"{path}: conversations are read from .jsonl, also .jsonl.gz, .jsonl.zst and .jsonl.xz")
        with DocumentFile(path, "messages") as lines:
            for number, line in lines:
                yield from _exchanges(line, f"{path}, line {number}")


def _exchanges(line: bytes, place: str) -> Iterator[Exchange]:
    """Those of one line."""
    messages = _messages(line, place)
    found = [index for index, message in enumerate(messages) if message["role"] == RESPONDS]
    if not found:
        raise DataError(f"{place}: no message of the role {RESPONDS!r}, so there is nothing to learn")
    if found[0] == 0:
        raise DataError(f"{place}: begins with a message of the role {RESPONDS!r}; a response needs a prompt")
    for index in found:
        yield Exchange(tuple(messages[:index]), messages[index]["content"], place)


def _messages(line: bytes, place: str) -> list[Message]:
    """The messages of one line; raises DataError if it is not a conversation."""
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error})") from error
    if isinstance(value, dict) and {key for _, key in PAIR} <= value.keys():
        user, response = ({"role": role, "content": value[key]} for role, key in PAIR)
        value = {"messages": [user, response]}
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in messages
    ):
        raise DataError(
            f'{place}: neither {{"messages": [{{"role": "user", "content": "..."}}, ...]}} nor '
            '{"prompt": "...", "response": "..."}, all of them texts'
        )
    return messages


def read_examples(files: Sequence[Path], template: str, tokenizer: Tokenizer) -> list[Example]:
    """The exchanges of `files` in tokens.

    Prompt and response are tokenized each on its own, so that no token holds parts of both.

    Raises:
      DataError: as `read_exchanges` and `load_template`; a prompt or response without tokens, or one that the tokenizer
        cannot encode.
    """
    render = load_template(template)
    exchanges = list(read_exchanges(files))
    prompts = [render(exchange.messages) for exchange in exchanges]
    encoded = [
        _encoded(tokenizer, texts, exchanges) for texts in (prompts, [exchange.response for exchange in exchanges])
    ]
    end = np.array([tokenizer.eod], np.int32)
    examples = []
    for exchange, prompt, before, after in zip(exchanges, prompts, *encoded, strict=True):
        if not len(before):
            check_not_empty(tokenizer, prompt, exchange.place)
            raise DataError(f"{exchange.place}: data.template={template} makes an empty prompt of this conversation")
        if not len(after):
            check_not_empty(tokenizer, exchange.response, exchange.place)
        examples.append(Example(before, np.concatenate([after, end]), exchange))
    return examples


def _encoded(tokenizer: Tokenizer, texts: Sequence[str], exchanges: Sequence[Exchange]) -> list[np.ndarray]:
    """The ids of `texts`; errors name the line."""
    try:
        return tokenizer.encode_batch(texts)
    except TokenizerError:
        for text, exchange in zip(texts, exchanges, strict=True):
            try:
                tokenizer.encode_batch([text])
            except TokenizerError as error:
                raise DataError(f"{exchange.place}: {error}") from error
        raise
