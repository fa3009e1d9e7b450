"""The folder of one run: its name, its lock, and whether a configuration may resume it.

runs/<name>/config.yaml  text.json  tokenizer.json  metrics.jsonl  summary.json  tensorboard/  routing/
            checkpoints/<step>/
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from unipool_jax.config.compose import load_config, save_config
from unipool_jax.config.errors import UserError
from unipool_jax.config.files import check_fields, read_json, write_atomically, write_json, writing
from unipool_jax.config.schema import Config, settings
from unipool_jax.config.settings_table import frozen_differences, reason

CONFIG, SUMMARY, TEXT, TOKENIZER, CHECKPOINTS = (
    "config.yaml", "summary.json", "text.json", "tokenizer.json", "checkpoints"
)  # fmt: skip

_SUMMARY_FIELDS = {
    "step": int,
    "tokens": int,
    "results": dict,
    "results.valid.loss": float,
    "results.*.loss": float,
    "results.*.perplexity": float,
    "results.*.bits_per_byte": float | None,
    "results.*.tokens": int,
    "results.*.bytes": int | None,
    "unigram": dict | None,
    "unigram.*.loss": float,
    "unigram.*.bits_per_byte": float | None,
    "tokens_per_second": float | None,
    "experts_used": int,
    "experts_total": int,
    "busiest_over_mean": float,
}
"""What every summary has, also one of an earlier version."""

_SEEN_WITHIN = 60.0
"""Seconds after which a file of another machine must be visible on shared storage; NFS may cache its absence."""


class RunError(UserError, RuntimeError):
    """The run folder cannot be used as requested; the message says why and what to do."""


def run_name(config: Config) -> str:
    """`run.name`, or a name derived from scale, method, steps and seed."""
    if config.run.name is not None:
        return config.run.name
    return f"{config.scale_name}-{config.method_name}-{config.train.steps}steps-seed{config.train.seed}"


def run_folder(config: Config) -> Path:
    """The folder of a run, which need not exist."""
    return Path(config.run.dir) / run_name(config)


def check_run_folder(config: Config) -> None:
    """Raise RunError if the folder of a run forbids to train it there; nothing is created or locked."""
    if _is_resumed(config):
        _check_same_run(config)


def _is_resumed(config: Config) -> bool:
    """Whether there is a run to resume; raises RunError for one that `run.resume` forbids or that cannot be read."""
    path = run_folder(config)
    # Without a checkpoint there is nothing to protect, so an attempt that failed early can be repeated.
    existing = holds_checkpoint(path)
    if existing and not (path / CONFIG).exists():
        raise RunError(
            f"{path} holds checkpoints but no {CONFIG}, which says how to read them; restore that file, "
            "delete the folder, or choose another run.name"
        )
    if existing and config.run.resume == "never":
        raise RunError(
            f"run.resume=never, but {path} holds a run; choose another run.name, delete the folder, or set "
            "run.resume=auto to resume"
        )
    if not existing and config.run.resume == "required":
        raise RunError(f"run.resume=required, but {path} holds no checkpoint; check run.dir and run.name")
    return existing


def _check_same_run(config: Config) -> None:
    path = run_folder(config)
    stored = load_config(path / CONFIG)
    # Text may have moved where its fingerprint can be compared: in a run that knows it and reads it again.
    # At step 0, after a conversion, nothing has been read yet.
    finished, started = (path / SUMMARY).exists(), saved_steps(path) != [0]
    known = not finished and ((path / TEXT).exists() or not started)
    changed = frozen_differences(stored, config, places=not known)
    if changed:
        before, now = settings(stored), settings(config)
        lines = [
            f"  - {name}: {before[name]!r} there, {now[name]!r} now{reason(name, stored, config)}" for name in changed
        ]
        raise RunError(
            f"{path} holds a run with other settings:\n"
            + "\n".join(lines)
            + "\nUse the settings of that run to resume it, or start a new run under another run.name."
        )


class RunFolder:
    """An open run folder, locked until it is closed or the process ends in any way.

    Args:
      config: of the run.
      writes: whether this process writes; otherwise nothing is created or locked, and process 0 must have opened it.

    Raises:
      RunError: another process trains in this folder, `run.resume` forbids what is there, or the folder holds a run
        with other settings.
    """

    def __init__(self, config: Config, *, writes: bool = True):
        self.path = run_folder(config)
        self._lock: TextIO | None = None
        if not writes:
            self._check_shared()
            return
        existing = _is_resumed(config)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
        try:
            if existing:
                _check_same_run(config)
            else:
                save_config(config, self.path / CONFIG)
        except BaseException:
            self.close()
            raise

    def _check_shared(self) -> None:
        """That this process sees what process 0 has just written."""
        deadline = time.monotonic() + _SEEN_WITHIN
        while not (self.path / CONFIG).exists():
            if time.monotonic() > deadline:
                raise RunError(
                    f"{self.path / CONFIG} is not there in this process, although process 0 wrote it; run.dir must be "
                    "on storage that all processes share"
                )
            time.sleep(0.1)

    def _take_lock(self) -> TextIO:
        stream = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            owner = stream.read().strip() or "unknown"
            stream.close()
            raise RunError(
                f"{self.path}: process {owner} is training in this folder; stop it or choose another run.name"
            ) from None
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        return stream

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / CHECKPOINTS

    def record(self, config: Config, text: Mapping[str, Any], tokenizer: bytes | None) -> None:
        """Write what training goes on with, once it is checked: settings, identity of the text, and tokenizer.

        Args:
          config: of the run.
          text: see `data/identity.py`.
          tokenizer: its tokenizer.json; None for a built-in one.
        """
        if self._lock is not None:
            if tokenizer is not None:
                write_atomically(self.path / TOKENIZER, tokenizer)
            save_config(config, self.path / CONFIG)
            write_json(self.path / TEXT, text, indent=1)

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run; None for a run that is not finished."""
        return read_summary(self.path) if (self.path / SUMMARY).exists() else None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the results, which marks the run as finished."""
        write_json(self.path / SUMMARY, summary, indent=2)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
      FileError: it is damaged.
    """
    path = folder / SUMMARY
    advice = "delete it and repeat the training command, which evaluates the last checkpoint anew"
    summary = read_json(path, advice)
    check_fields(summary, path, _SUMMARY_FIELDS, advice)
    return summary


def known_text(folder: Path, meta: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The identity of the text of a run, from a checkpoint's meta document or from the run's folder; None in runs of
    earlier versions, which do not know it.

    Raises:
      FileError: the file is damaged.
    """
    found = (meta or {}).get("text")
    if found is None and (folder / TEXT).exists():
        found = read_json(folder / TEXT, "delete it if the text is that of the run: it is written anew")
    if found is not None:
        check_fields(found, folder, {"fingerprint": str, "tokenizer_sha256": str, "texts": list})
    return found


def holds_checkpoint(folder: Path) -> bool:
    """Whether a run folder has at least one complete checkpoint."""
    return bool(saved_steps(folder))


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending."""
    return sorted(int(path.name) for path in (folder / CHECKPOINTS).glob("*") if path.name.isdigit())


def find_run(wanted: str) -> Path:
    """The run folder `wanted`; `FOLDER/latest` is the run in FOLDER with the newest checkpoint (`latest`: in `runs`).

    Raises:
      RunError: there is no such run.
    """
    path = Path(wanted)
    if path.name != "latest" or path.exists():
        if not (path / CONFIG).exists():
            raise RunError(f"run={wanted}: no run here (no {CONFIG}); give the folder of a run, or run=latest")
        return path
    parent = path.parent if path.parent != Path() else Path("runs")
    found = [folder for folder in sorted(parent.glob("*")) if holds_checkpoint(folder)]
    if not found:
        raise RunError(f"run={wanted}: no run with a checkpoint in {parent}/; train one first with unipool train")
    return max(found, key=lambda folder: (folder / CHECKPOINTS).stat().st_mtime)
