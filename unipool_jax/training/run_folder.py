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
from unipool_jax.training import lineage
from unipool_jax.training.opening import TOKENIZER, relocated
from unipool_jax.training.run_names import CHECKPOINTS, CONFIG, run_folder
from unipool_jax.training.run_names import run_name as run_name

SUMMARY, TEXT = "summary.json", "text.json"
_RUNS = Path("runs")

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


def _check_same_run(config: Config) -> int | None:
    """Raise RunError if the folder holds a run with other settings; the length of a finished run that is extended."""
    path = run_folder(config)
    stored = load_config(path / CONFIG)
    # What an extension changes. The rates of an earlier one are past.
    extends = config.train.lengths[:-1] == stored.train.lengths and is_finished(path, stored)
    free = {"train.steps", "train.earlier_steps"} if extends else set()
    if extends and not stored.train.earlier_steps:
        free.add("optimizer.extension")
    # Text may have moved where its fingerprint can be compared: in a run that knows it and reads it again.
    # At step 0, after a conversion, nothing has been read yet.
    finished, started = (path / SUMMARY).exists() and not extends, saved_steps(path) != [0]
    known = not finished and ((path / TEXT).exists() or not started)
    before, here, now = settings(stored), settings(relocated(path, stored)), settings(config)
    changed = [
        name
        for name in frozen_differences(stored, config, places=not known)
        if name not in free and now[name] != here[name]  # the same file, as it is called from this folder
    ]
    if changed:
        lines = [
            f"  - {name}: {before[name]!r} there, {now[name]!r} now{reason(name, stored, config)}" for name in changed
        ]
        advice = "Use the settings of that run to resume it, or start a new run under another run.name."
        if config.train.steps in stored.train.earlier_steps:
            advice = f"It was extended to {stored.train.steps} steps: unipool train {path} goes on with it."
        elif changed == ["train.steps"] and config.train.steps > stored.train.steps:
            advice = f"To extend it once it is finished: unipool train {path} train.steps={config.train.steps}"
        raise RunError("\n".join([f"{path} holds a run with other settings:", *lines, advice]))
    return stored.train.steps if extends else None


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
        self._earlier_steps = config.train.earlier_steps
        self._extends: int | None = None
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
                self._extends = _check_same_run(config)
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

    def _keep_earlier_summary(self, config: Config) -> None:
        """Results of a run that was extended are kept under another name, because `summary.json` marks the end."""
        if config.train.earlier_steps and (self.path / SUMMARY).exists():
            step = read_summary(self.path)["step"]
            if step in config.train.earlier_steps:
                with writing(self.path):
                    (self.path / SUMMARY).rename(self.path / f"summary-{step}.json")

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
        if self._lock is None:
            return
        if self._extends is not None:
            facts = {"to": config.train.steps, "optimizer.extension": config.optimizer.extension}
            lineage.record(self.path, "extended", self._extends, **facts)
        if tokenizer is not None:
            write_atomically(self.path / TOKENIZER, tokenizer)
        save_config(config, self.path / CONFIG)
        write_json(self.path / TEXT, text, indent=1)
        self._keep_earlier_summary(config)

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run; None for a run that is not finished."""
        summary = read_summary(self.path) if (self.path / SUMMARY).exists() else None
        # On a shared file system another process may still see that of a run that is being extended.
        return None if summary is None or summary["step"] in self._earlier_steps else summary

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


def is_finished(folder: Path, config: Config) -> bool:
    """Whether the run of `config` in a folder has its results and can go on; raises FileError if they are damaged."""
    summary = folder / SUMMARY
    return summary.exists() and holds_checkpoint(folder) and read_summary(folder)["step"] == config.train.steps


def holds_checkpoint(folder: Path) -> bool:
    """Whether a run folder has at least one complete checkpoint."""
    return bool(saved_steps(folder))


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending."""
    return sorted(int(path.name) for path in (folder / CHECKPOINTS).glob("*") if path.name.isdigit())


def find_checkpoint(wanted: str, setting: str) -> tuple[Path, int | None]:
    """The folder of checkpoints and the step that `wanted` names: a run, for its newest one (None), or a checkpoint.

    Raises:
      RunError: there is no such run or checkpoint; begins with the name of `setting`.
    """
    path = Path(wanted)
    if path.name.isdigit() and path.parent.name == CHECKPOINTS:
        return named_checkpoint(wanted, setting)
    return find_run(wanted, setting) / CHECKPOINTS, None


def named_checkpoint(wanted: str, setting: str) -> tuple[Path, int]:
    """The folder of checkpoints and the step of the checkpoint `wanted`; raises RunError if it is none."""
    path = Path(wanted)
    if not path.is_dir() or not path.name.isdigit():
        raise RunError(
            f"{setting}={wanted}: not a checkpoint; give its folder, for example runs/NAME/{CHECKPOINTS}/200"
        )
    return path.parent, int(path.name)


def find_run(wanted: str, setting: str = "run") -> Path:
    """The run folder `wanted`: a path, or the name of a run in `runs`; `FOLDER/latest` is the run in FOLDER with the
    newest checkpoint (`latest`: in `runs`).

    Raises:
      RunError: there is no such run.
    """
    path = Path(wanted)
    if path.name != "latest" or path.exists():
        named = [path] if path.is_absolute() or len(path.parts) != 1 else [path, _RUNS / path]
        # Not `Path.exists`, which raises for a text that is too long for a name.
        found = [folder for folder in named if os.path.exists(folder / CONFIG)]
        if len(found) == 2:
            raise RunError(f"{setting}={wanted}: both ./{path} and {_RUNS / path} are runs; give one of these")
        if not found:
            raise RunError(f"{setting}={wanted}: no run here (no {CONFIG}); give the folder of a run, or run=latest")
        return found[0]
    parent = path.parent if path.parent != Path() else _RUNS
    found = [folder for folder in sorted(parent.glob("*")) if holds_checkpoint(folder)]
    if not found:
        raise RunError(f"run={wanted}: no run with a checkpoint in {parent}/; train one first with unipool train")
    return max(found, key=lambda folder: (folder / CHECKPOINTS).stat().st_mtime)
