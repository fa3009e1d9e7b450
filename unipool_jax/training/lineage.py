"""Where the parameters of a run come from: `lineage.json` in its folder, one event for a start from another run, as it
is or converted, and one for each extension."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unipool_jax.config.files import read_entries, write_json
from unipool_jax.config.version import VERSION, git_commit

LINEAGE = "lineage.json"


def read_lineage(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; none for a run that began with random parameters and was not extended.

    Raises:
      FileError: the file is damaged.
    """
    return read_entries(folder / LINEAGE, "events", {"events.*.event": str, "events.*.step": int})


def record(folder: Path, event: str, step: int, **facts: Any) -> None:
    """Add an event after `step` steps; one that was recorded there or later never came about, and goes."""
    before = [known for known in read_lineage(folder) if known.get("step", 0) < step]
    found = {"event": event, "step": step, **facts, "version": VERSION, "git_commit": git_commit()}
    write_json(folder / LINEAGE, {"events": [*before, found]}, indent=2)


def parent_of(run: Path, step: int, meta: Mapping[str, Any]) -> dict[str, Any]:
    """What is recorded of the checkpoint that a run starts from; `meta` is its document."""
    return {
        "parent": str(run),
        "parent_step": step,
        "parent_sha256": hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest(),
        "parent_git_commit": meta.get("git_commit"),
        "parent_lineage": read_lineage(run),
    }
