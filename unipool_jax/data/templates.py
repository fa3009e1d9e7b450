"""Chat templates: Jinja texts that turn messages into the prompt of the next response.

A template is data, possibly of someone else, so it runs in Jinja's immutable sandbox: it reads its variables and can do
nothing else. Jinja is imported when a template is used, never by other training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unipool_jax.config.files import FileError, read_text
from unipool_jax.data.errors import DataError

Message = Mapping[str, str]
"""`role` and `content`."""

# Jinja drops a newline at the very end of a template, so the last one is in an expression.
TEMPLATES = {
    # For tasks of one question and one answer: the prompt as it is.
    "prompt": "{{ messages[-1].content }}",
    "plain": (
        "{% for message in messages %}{{ message.role }}:\n{{ message.content }}\n\n{% endfor %}{{ 'assistant:\n' }}"
    ),
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}"
    ),
}
"""Templates by name. Markers are text like any other: no text makes a tokenizer's special tokens."""


def template_source(name: str) -> str:
    """The Jinja text of template `name`: one of `TEMPLATES`, or a file's path; raises DataError."""
    try:
        return TEMPLATES[name] if name in TEMPLATES else read_text(Path(name))
    except FileError as error:
        known = ", ".join(TEMPLATES)
        raise DataError(f"data.template={name}: none of {known}, and not a file of text ({error})") from error


def load_template(name: str) -> Callable[[Sequence[Message]], str]:
    """The function from messages to a prompt that template `name` describes: one of `TEMPLATES`, or a file's path.

    A template sees `messages`, `add_generation_prompt` (always true), empty `bos_token` and `eos_token`, and
    `raise_exception(message)`, as templates of published models do.

    Raises:
      DataError: no such template, Jinja is not installed, or, from the function, a template that fails.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise DataError('chat templates need the package jinja2: pip install ".[chat]" in the checkout') from error
    source = template_source(name)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    # The whitespace rules are those that templates of published models are written for.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    variables: dict[str, Any] = {"add_generation_prompt": True, "bos_token": "", "eos_token": ""}
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise DataError(f"data.template={name}: {error}") from error

    def render(messages: Sequence[Message]) -> str:
        try:
            return template.render(messages=messages, **variables)
        except Exception as error:  # whatever the expressions of a template raise
            raise DataError(f"data.template={name}: {error}") from error

    return render
