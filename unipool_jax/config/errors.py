"""The base of every error that a user can put right."""

from __future__ import annotations

from typing import ClassVar


class UserError(Exception):
    """Something a user can put right; the message says what. The command line prints it without a traceback."""

    exit_code: ClassVar[int] = 1
    """Of a command that it ends."""

    def __init__(self, message: str = ""):
        # Python decodes bytes of a path that are not UTF-8 to lone surrogates, which no terminal or file can take.
        super().__init__(message.encode("utf-8", "backslashreplace").decode())
