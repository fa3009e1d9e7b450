"""The record of the processes that trained a run."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from unipool_jax.config.files import FileError
from unipool_jax.training import sessions
from unipool_jax.training.sessions import Session, read_sessions


def test_every_process_leaves_an_entry(tmp_path: Path) -> None:
    with Session(tmp_path, 0) as first:
        assert first.compile_seconds is None
        (running,) = read_sessions(tmp_path)
        assert running["end"] is None  # what a killed process leaves
        first.compiled(12.34)
    second = Session(tmp_path, 10)
    assert second.compile_seconds == 12.3
    with pytest.raises(ValueError, match="broken"), second:
        raise ValueError("broken")
    with Session(tmp_path, 20) as third:
        assert third.ended(143) == 143
    entries = read_sessions(tmp_path)
    assert [entry["step"] for entry in entries] == [0, 10, 20]
    assert [entry.get("exit_code") for entry in entries] == [None, None, 143]
    assert entries[1]["error"] == "ValueError: broken"
    for entry in entries[1:]:
        start, end = (datetime.datetime.fromisoformat(entry[name]) for name in ("start", "end"))
        assert start.utcoffset() == datetime.timedelta(0)
        assert start <= end
    known = {"host", "command", "folder", "version", "git_commit", "python", "system", "packages", "environment"}
    assert known < entries[0].keys()
    assert entries[0]["devices"] == {"kind": "cpu", "count": 8, "processes": 1}
    assert {"jax", "jaxlib", "orbax-checkpoint"} < entries[0]["packages"].keys()


def test_a_full_disk_changes_neither_exit_code_nor_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(tmp_path, 0)

    def full(path: Path, document: Any, indent: int) -> None:
        raise FileError(f"{path}: no room for {len(document)}, {indent}")

    monkeypatch.setattr(sessions, "write_json", full)
    assert session.ended(143) == 143
    with pytest.raises(ValueError, match="the first"), session:
        raise ValueError("the first")
    assert capsys.readouterr().err.count("sessions.json: no room") == 2


def test_compilation_on_other_devices_tells_nothing(tmp_path: Path) -> None:
    with Session(tmp_path, 0) as session:
        session.compiled(12.0)
    document = json.loads((tmp_path / "sessions.json").read_text())
    document["sessions"][0]["devices"]["count"] = 64
    (tmp_path / "sessions.json").write_text(json.dumps(document))
    with Session(tmp_path, 0) as session:
        assert session.compile_seconds is None


def test_other_processes_of_a_run_write_nothing(tmp_path: Path) -> None:
    with Session(tmp_path, 0, writes=False) as session:
        session.compiled(1.0)
        session.ended(0)
    assert not list(tmp_path.iterdir())


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "sessions.json").write_text("{}")
    with pytest.raises(FileError, match=r"sessions\.json: sessions is missing; delete it"):
        Session(tmp_path, 0)
