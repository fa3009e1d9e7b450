"""Settings of the commands `chat` and `answers`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from unipool_jax.config.ranges import Range
from unipool_jax.config.words import Positional

_STEP = Range(0, 1_000_000_000)
_TOKENS = Range(1, 1_048_576)
_TEMPERATURE = Range(0, 1e6)
_TOP_P = Range(0, 1, open_low=True)
_SEED = Range(0, 2**32 - 1)


@dataclass(frozen=True)
class ChatRequest:
    """Talk to a model in the terminal.

    An empty line or the end of the input (Ctrl-D) ends it, /new begins another conversation. The template is that of
    the run.

        unipool chat runs/tuned
        unipool chat runs/tuned temperature=0 max_tokens=32
    """

    run: Annotated[str, Positional()] = "latest"
    """Folder of a run, or `latest`, the run below runs/ that was saved to last."""
    step: Annotated[int | None, _STEP] = None
    """Which checkpoint of the run; null is the newest."""
    system: str | None = None
    """A message of the role `system` at the beginning."""
    max_tokens: Annotated[int, _TOKENS] = 64
    """Tokens of a response at most."""
    temperature: Annotated[float, _TEMPERATURE] = 0.8
    """Logits are divided by it; 0 takes the most probable token each time."""
    top_p: Annotated[float, _TOP_P] = 0.95
    """Draw only from the most probable tokens that together have this probability."""
    seed: Annotated[int, _SEED] = 0
    """Of the random draws."""


@dataclass(frozen=True)
class AnswersRequest:
    """Let a model answer the prompts of conversations, and count the answers that are exactly the response.

    Prints the share with its 95% Wilson interval and, last, one line of JSON. The template is that of the run.

        unipool answers runs/tuned files=[held_out.jsonl]
        unipool answers runs/tuned files=[held_out.jsonl] limit=200 out=answers.jsonl
    """

    run: Annotated[str, Positional()] = "latest"
    """Folder of a run, or `latest`, the run below runs/ that was saved to last."""
    step: Annotated[int | None, _STEP] = None
    """Which checkpoint of the run; null is the newest."""
    files: tuple[str, ...] = ()
    """Conversations as data=conversations reads them; each response is a question."""
    limit: Annotated[int | None, _TOKENS] = None
    """Questions at most, the first ones; null is all."""
    max_tokens: Annotated[int | None, _TOKENS] = None
    """Tokens of an answer at most; null is what the longest response of the files needs."""
    temperature: Annotated[float, _TEMPERATURE] = 0.0
    """Logits are divided by it; 0 takes the most probable token each time."""
    top_p: Annotated[float, _TOP_P] = 1.0
    """Draw only from the most probable tokens that together have this probability."""
    seed: Annotated[int, _SEED] = 0
    """Of the random draws."""
    out: str | None = None
    """File to write every answer to, one line of JSON each."""

    def problems(self) -> Iterator[str]:
        """What is missing."""
        if not self.files:
            yield "files=: no conversations to answer; for example files=[held_out.jsonl]"
