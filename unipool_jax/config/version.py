"""Which code this is: its version, and the commit it comes from."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

VERSION = "0.1.0"
"""Of the package; setup.cfg reads it here."""

_PACKAGE = Path(__file__).resolve().parents[1]
RECORDED = "COMMIT"
"""File in an installed package with the commit that it was built from, see setup.py."""


@functools.cache
def git_commit() -> str | None:
    """The commit of the sources, with `-dirty` for uncommitted changes: that of the checkout, or what was recorded when
    the package was built; None where nothing says."""
    if (_PACKAGE.parent / ".git").exists():
        return describe_commit(_PACKAGE.parent)
    recorded = _PACKAGE / RECORDED
    return recorded.read_text(encoding="utf-8").strip() if recorded.exists() else None


def describe_commit(checkout: Path) -> str | None:
    """What git says about a checkout; None without git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=checkout,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
