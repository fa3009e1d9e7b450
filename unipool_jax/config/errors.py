"""The base of every error that a user can put right."""

from __future__ import annotations

from typing import ClassVar


class UserError(Exception):
    """Something a user can put right; the message says what. The command line prints it without a traceback."""

    exit_code: ClassVar[int] = 1
    """Of a command that it ends."""
