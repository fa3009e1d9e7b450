"""The processes of `benchmarks.train_step`: they train, report, and say why when they cannot."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import train_step
from benchmarks.contenders import Contender, ContenderError, Kind, Worker
from tiny import tiny_config


@pytest.mark.parametrize("kind", ["jax", "pytorch"])
def test_a_contender_trains_in_a_process_of_its_own(kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    worker = Worker(Contender(f"tiny {kind}", kind, tiny_config("vanilla")))
    seconds = train_step.measure([worker], 2)
    train_step.report([worker], seconds, 64)
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[:3] == ["tiny", kind, "1.000"]
    assert 50 < int(row[-2]) < 20_000  # MB
    assert min(worker.first_seconds, *seconds[f"tiny {kind}"]) > 0


def test_a_contender_that_cannot_run_is_named_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config("vanilla")
    broken = dataclasses.replace(config, model=dataclasses.replace(config.model, num_heads=3))
    contender = Contender("three heads", "jax", broken)
    with pytest.raises(ContenderError, match=r"three heads: .*Error: "):
        Worker(contender)
    assert train_step.start([contender]) == []
    assert "left out: three heads" in capsys.readouterr().out


def test_what_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {name: tiny_config(name) for name in ("dense", "vanilla", "unipool")}
    for installed, kinds in ((False, ["jax"]), (True, ["jax", "pytorch", "pytorch-compiled"])):
        monkeypatch.setattr(train_step, "has_torch", lambda installed=installed: installed)
        groups = list(train_step.rounds(configs, "pytorch"))
        assert [[c.kind for c in group] for group in groups] == [kinds] * 3
    (group,) = train_step.rounds(configs, "vanilla")
    assert [c.name for c in group] == ["vanilla", "dense", "unipool"]


def test_the_processes_load_no_framework_but_their_own() -> None:
    """Each starts by importing these modules, and their memory is what is measured."""
    code = "import sys, benchmarks.train_step; print([m for m in ('jax', 'torch') if m in sys.modules])"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
