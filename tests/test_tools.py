"""Answers with programs in them, from a model that is a list of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from unipool_jax.aptitude import executor
from unipool_jax.aptitude.tools import answers, boxed, final_answer, same_answer

CONTAINED = pytest.mark.skipif(executor.unavailable() is not None, reason=str(executor.unavailable()))


def script(*texts: str | None) -> tuple[Callable[[Sequence[str]], list[str | None]], list[str]]:
    """Continues a prompt with one text after the other, and what it was asked."""
    left, asked = list(texts), list[str]()

    def complete(prompts: Sequence[str]) -> list[str | None]:
        asked.extend(prompts)
        return [left.pop(0) for _ in prompts]

    return complete, asked


@CONTAINED
def test_a_program_is_run_and_its_output_is_read() -> None:
    complete, asked = script(" So:\n```python\nprint(6 * 7)\n```\nI guess 41.", r"Hence \boxed{42}.")
    found = answers(["Q"], complete)
    block = " So:\n```python\nprint(6 * 7)\n```\n```output\n42\n```\n"
    assert found == [block + r"Hence \boxed{42}."]
    assert asked == ["Q", "Q" + block]


@CONTAINED
def test_rounds_end() -> None:
    program = "```python\n1 / 0\n```"
    complete, asked = script(*[program] * 9)
    found = answers(["Q"], complete, rounds=3)
    assert len(asked) == 3
    assert found[0] is not None
    assert found[0].count("ZeroDivisionError") == 2  # the last program is not run: nobody would read what it printed


def test_text_takes_one_round_and_ends_at_the_next_question() -> None:
    complete, asked = script(" 7\n\nQuestion: another\nAnswer: 8", None)
    assert answers(["a", "b"], complete) == [" 7", None]
    assert asked == ["a", "b"]


def test_a_boxed_answer_ends_an_answer() -> None:
    complete, asked = script("\\boxed{3}\n```python\nprint(4)\n```")
    answers(["a"], complete)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("text", "inside"),
    [(r"\boxed{1} \boxed{\frac{1}{2}}", r"\frac{1}{2}"), ("boxed{1}", None), (r"\boxed{1", None)],
)
def test_boxes(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{7} it is", "7"),
        ("Two and two.\nThe answer is: 4.\n", "4."),
        ("```output\n12\n```\n", "12"),
        (" \n", None),
    ],
)
def test_the_last_line_is_the_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_answers_are_compared_as_numbers_and_as_text() -> None:
    for found, right in (("4.", "4"), ("1,000", "1000.0"), (" $7", "7"), ("x + 1", "x+1"), ("0.50", "0.5")):
        assert same_answer(found, right)
    assert not same_answer(None, "4")
    for found, wrong in (("40", "4"), ("x", "y"), ("", "0")):
        assert not same_answer(found, wrong)
