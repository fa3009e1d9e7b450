r"""Problems for the study of aptitude selection: sums, where a tool helps, and orders, where it has nothing to compute.

Each has a solution in text and one as a program, with what the program prints. The program of a sum computes it; that
of an order prints an answer that whoever writes it has to know.

    47+58            7+8+0=15, 4+5+1=10, \boxed{105}
    d>a, b>d; most   b>d>a, \boxed{b}
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence

from unipool_jax.aptitude.candidates import Candidate
from unipool_jax.aptitude.likelihood import demonstration

SOURCES = ("sums", "orders")
LETTERS, ORDERED = "abcdefghijkl", 3
"""Of orders, and how many one has."""
ASKED = ("most", "least")
DIGITS = 2
"""Of the numbers of a sum."""


def program(source: str, printed: str) -> str:
    """A program as an answer, with its output and what that says."""
    return f"```python\n{source}\n```\n```output\n{printed}\n```\n\\boxed{{{printed}}}"


def a_sum(rng: random.Random) -> tuple[str, str, str, str]:
    """Question, text, program and answer of a sum of two numbers."""
    first, second = (rng.randrange(10 ** (DIGITS - 1), 10**DIGITS) for _ in range(2))
    steps, carried = [], 0
    for digit in range(DIGITS):
        a, b = (number // 10**digit % 10 for number in (first, second))
        steps.append(f"{a}+{b}+{carried}={a + b + carried:02}")
        carried = (a + b + carried) // 10
    answer = str(first + second)
    text = ", ".join([*steps, f"\\boxed{{{answer}}}"])
    return f"{first}+{second}", text, program(f"print({first}+{second})", answer), answer


def an_order(rng: random.Random) -> tuple[str, str, str, str]:
    """Question, text, program and answer of which of some letters is most or least, given neighbors."""
    chain = rng.sample(LETTERS, ORDERED)
    neighbors = [f"{more}>{less}" for more, less in itertools.pairwise(chain)]
    rng.shuffle(neighbors)
    asked = rng.choice(ASKED)
    answer = chain[0 if asked == "most" else -1]
    text = f"{'>'.join(chain)}, \\boxed{{{answer}}}"
    return f"{', '.join(neighbors)}; {asked}", text, program(f"print('{answer}')", answer), answer


def draw(seed: int, count: int, without: Iterable[Candidate] = ()) -> list[Candidate]:
    """Problems of each source, all different.

    Args:
      seed: of the draws.
      count: of each source.
      without: problems that are not drawn.
    """
    rng, known = random.Random(seed), {one.question for one in without}
    found = list[Candidate]()
    for source, make in zip(SOURCES, (a_sum, an_order), strict=True):
        while len(found) < count * (1 + SOURCES.index(source)):
            question, text, code, answer = make(rng)
            if question not in known:
                known.add(question)
                found.append(Candidate(f"{source}-{len(found)}", source, question, (text,), (code,), answer))
    return found


def shots(problems: Sequence[Candidate], seed: int, count: int) -> Iterator[str]:
    """Two problems of one source after one another, each answered in text, as a program, or bare.

    Args:
      problems: to draw from.
      seed: of the draws.
      count: of documents.
    """
    rng = random.Random(f"shots {seed}")
    own = {source: [one for one in problems if one.source == source] for source in SOURCES}
    for number in range(count):
        pair = rng.sample(own[SOURCES[number % len(SOURCES)]], 2)
        answers = [rng.choice((one.cot[0], one.tir[0], one.answer)) for one in pair]
        yield "".join(map(demonstration, (one.question for one in pair), answers))


def markup() -> list[str]:
    """Texts for a tokenizer, without what problems consist of: digits and letters stay tokens of their own.

    Programs are alone, so that the blank before them is no part of their first token: it ends a prompt.
    """
    programs = [program("print(+)", ""), program("print('')", "")]
    return [demonstration("+", "+=, \\boxed{}"), *(demonstration(f">, >; {word}", ">") for word in ASKED), *programs]
