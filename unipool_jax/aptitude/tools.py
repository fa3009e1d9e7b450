"""Answers that may have programs in them: text goes on, programs are run, what they print is read, and so on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation

from unipool_jax.aptitude.executor import Limits, execute

ROUNDS = 6
"""Continuations of one answer at most, as published; text without a program takes one."""
FRAME = "\n\nQuestion:"
"""Where a model begins another question, its answer has ended."""

_PROGRAM = re.compile(r"```python\n(.*?)\n```", re.DOTALL)

Complete = Callable[[Sequence[str]], Sequence[str | None]]
"""Continues texts; None for one that leaves no room."""


def answers(
    prompts: Sequence[str], complete: Complete, rounds: int = ROUNDS, limits: Limits | None = None
) -> list[str | None]:
    """What follows each prompt, with what the programs in it printed.

    A continuation is cut behind its first program; the program is run, its output is appended in a block of its own,
    and the text goes on, until a boxed answer, a text without a program, or the last round. Each program runs alone:
    nothing is left of the one before.

    Args:
      prompts: they are not part of what is returned.
      complete: the model.
      rounds: see `ROUNDS`.
      limits: of each program.

    Returns:
      None where there was no room for a first continuation.

    Raises:
      UserError: there is a program, and nothing here contains it.
    """
    found: list[str | None] = [None] * len(prompts)
    going = list(range(len(prompts)))
    for number in range(rounds):
        texts = complete([prompts[one] + (found[one] or "") for one in going])
        still = []
        for one, text in zip(going, texts, strict=True):
            if text is None:
                continue
            text = text.partition(FRAME)[0]
            program = _PROGRAM.search(text)
            before = text if program is None else text[: program.end()]
            found[one] = (found[one] or "") + before
            if program is not None and boxed(before) is None and number + 1 < rounds:
                output = execute(program.group(1), limits).output.rstrip("\n")
                found[one] = f"{found[one]}\n```output\n{output}\n```\n"
                still.append(one)
        going = still
        if not going:
            break
    return found


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, braces inside it included; None without one that is closed."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    first = start + len(r"\boxed{")
    depth = 1
    for place in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[first:place]
    return None


def final_answer(text: str) -> str | None:
    """The boxed answer, else the last line that is not empty and no end of a block, without `The answer is`.

    Args:
      text: of the model alone: a demonstration has an answer too.
    """
    if (inside := boxed(text)) is not None:
        return inside
    lines = [line.strip() for line in text.splitlines() if line.strip().strip("`")]
    return re.sub(r"^.*answer is:?\s*", "", lines[-1], flags=re.IGNORECASE) if lines else None


def same_answer(found: str | None, right: str) -> bool:
    """Whether two answers are the same number, or the same text apart from spaces, `$`, commas and a full stop."""
    if found is None:
        return False
    first, second = (re.sub(r"[\s$,]", "", text).removesuffix(".") for text in (found, right))
    try:
        return Decimal(first) == Decimal(second)
    except InvalidOperation:
        return first == second
