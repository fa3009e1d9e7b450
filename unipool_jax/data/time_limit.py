"""Calls into native code that may never return, such as a regular expression that backtracks without end."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, or TimeoutError after `seconds`.

    A call that has not returned by then goes on in the background until the process ends: native code cannot be
    interrupted. It must release the interpreter lock, or waiting for it has no limit.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]


@contextlib.contextmanager
def without_stderr() -> Iterator[None]:
    """Drops what native code writes to stderr, such as the report of a panic that is caught."""
    sys.stderr.flush()
    with open(os.devnull, "wb") as nowhere:
        saved = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
