"""The progress line, and the file that holds what a run prints."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from unipool_jax.config.errors import UserError
from unipool_jax.training.console import Progress, copied_to, format_seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO | None) -> None:
    """A run of two steps that is told a minute apart."""
    now = iter([0.0, 5.0, 65.0])
    progress = Progress(100, stream, lambda: next(now))
    progress.step(1, 10.0, 1e-4, None, None)
    progress.step(2, 9.5, 2e-4, 12_345.6, 3700.0)
    progress.message("saved")


LINES = (
    "step   1/100  loss 10.0000  lr 1.00e-04  0:05 elapsed\n"
    "step   2/100  loss 9.5000  lr 2.00e-04  12,346 tokens/s  1:05 elapsed  1:01:40 left\n"
    "saved\n"
)


def test_progress_rewrites_its_line_only_on_a_terminal() -> None:
    plain, terminal = io.StringIO(), Terminal()
    show(plain)
    show(terminal)
    assert plain.getvalue() == LINES
    assert terminal.getvalue().count("\r") == 2
    assert terminal.getvalue().endswith("left\x1b[K\nsaved\n")


def test_durations() -> None:
    assert [format_seconds(s) for s in (0, 75, 3700, 183_600)] == ["0:00", "1:15", "1:01:40", "2d 03:00:00"]


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_the_file_holds_what_is_printed_as_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[io.StringIO]
) -> None:
    out, err = kind(), kind()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    for number in (1, 2):
        with copied_to(tmp_path / "log.txt", f"session {number}"):
            assert sys.stdout.isatty() == out.isatty()
            show(None)
            print("\x1b[1mbold\x1b[0m")
            print("to stderr", file=sys.stderr)
    print("outside")
    session = LINES + "bold\nto stderr\n"
    assert (tmp_path / "log.txt").read_text() == f"==== session 1\n{session}==== session 2\n{session}"
    assert out.getvalue().count("\x1b[1mbold") == 2
    assert out.getvalue().endswith("outside\n")
    assert err.getvalue() == "to stderr\n" * 2


@pytest.mark.parametrize(
    ("error", "expected"), [(UserError("what to do"), "what to do\n"), (ValueError("a fault"), "ValueError: a fault\n")]
)
def test_the_error_that_ends_a_session_is_in_the_file(tmp_path: Path, error: Exception, expected: str) -> None:
    with pytest.raises(type(error)), copied_to(tmp_path / "log.txt", "session"):
        raise error
    text = (tmp_path / "log.txt").read_text()
    assert text.endswith(expected)
    assert ("Traceback" in text) == isinstance(error, ValueError)


def test_a_file_that_cannot_be_written_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with copied_to(tmp_path / "log.txt", "session"):
        print("one")
        print("two")
    found = capsys.readouterr()
    assert found.out == "one\ntwo\n"
    assert found.err.count("log.txt: No space left on device; what is printed from now on is not in it") == 1
