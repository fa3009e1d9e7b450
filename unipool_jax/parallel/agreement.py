"""What must be the same in every process of a run, as facts by name."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from unipool_jax.config.schema import Config, settings
from unipool_jax.config.settings_table import shared_settings
from unipool_jax.config.version import VERSION, git_commit

Facts = Mapping[str, str]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu")
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")
_LOCAL_VARIABLE = re.compile(
    r"JAX_(COMPILATION_CACHE|PERSISTENT_CACHE|COORDINATOR|PROCESS|LOCAL_|PARTITION|SLICE|LOG|DUMP|TRACEBACK|DEBUG_LOG"
    r"|\w*VISIBLE_DEVICES|NUM_CPU_DEVICES|NUM_PROCESSES)"
)
"""Variables of JAX that say where a process is, where it keeps and logs things, or which devices are its own."""
_MOST_LINES = 20


def facts(config: Config) -> dict[str, str]:
    """Settings, code, packages and environment: what is known before JAX starts."""
    values = settings(config)
    found = {name: str(values[name]) for name in shared_settings()}
    # On a file system that all share.
    found["run.dir"] = os.path.abspath(config.run.dir)
    found["code of unipool_jax"] = _code()
    for package in (*_PACKAGES, *_PLUGINS):
        found[f"package {package}"] = _installed(package)
    for name in sorted(os.environ):
        if (name.startswith("JAX_") and not _LOCAL_VARIABLE.match(name)) or name == "LIBTPU_INIT_ARGS":
            found[f"environment {name}"] = os.environ[name] or "empty"
    # Where XLA writes its dumps may differ.
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith("--xla_dump")]
    found["environment XLA_FLAGS"] = " ".join(sorted(flags)) or "unset"
    return found


def _code() -> str:
    """Version, commit and a digest of the sources, because a commit does not name what was edited since."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return f"{VERSION}, commit {git_commit() or 'unknown'}, sources {digest.hexdigest()[:12]}"


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def difference(all_facts: Sequence[Facts | None]) -> str:
    """In which facts processes differ from process 0, with both values; empty where all agree. None is not compared."""
    first = all_facts[0]
    assert first is not None
    lines = [
        f"  - {name}: {first.get(name, 'unset')} in process 0, {other.get(name, 'unset')} in process {number}"
        for number, other in enumerate(all_facts)
        if other is not None
        for name in (*first, *(name for name in other if name not in first))
        if first.get(name) != other.get(name)
    ]
    if not lines:
        return ""
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"  - and {len(lines) - _MOST_LINES} more"]
    return (
        "the processes do not run the same thing:\n"
        + "\n".join(lines)
        + "\nStart all of them with the same settings, code, packages, devices and text."
    )
