"""Each small file of a run with each kind of damage: the command says which file, what is wrong and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from test_compare import make_run
from test_receive_buffers import buffers
from unipool_jax.cli.main import main
from unipool_jax.config.files import FileError, write_array
from unipool_jax.training.placement import newest_counts
from unipool_jax.training.receive_buffers import FILE


def _write(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


_DEEP = 100_000
_ANY = {
    "empty": _write(b""),
    "zeros": _write(b"\0" * 300),
    "not UTF-8": _write(b"caf\xe9: 1\n"),
    "a folder": _folder,
}
_JSON = _ANY | {"deep": _write(b'{"a": ' * _DEEP), "a list": _write(b"[1]"), "cut off": _truncate}
_YAML = _ANY | {
    "deep": _write(b"model: " + b"[" * _DEEP),
    "a list": _write(b"- 1\n"),
    "a tag": _write(b"model: !!timestamp x\n"),
    "a wrong type": _write(b"model: 3\n"),
    "a wrong value": _write(b"model: {num_layers: many}\n"),
}
_SUMMARY = _JSON | {
    "no results": _write(b'{"step": 1, "tokens": 2}'),
    "results of another type": _write(b'{"step": 1, "tokens": 2, "results": [1]}'),
    "a loss that is text": _write(b'{"step": 1, "tokens": 2, "results": {"valid": {"loss": "low"}}}'),
}
_LINES = {
    "a step that is text": _write(b'{"kind": "valid", "step": "20", "loss": 1}\n{"kind": "valid", "step": 40}\n'),
    "a step that is a list": _write(b'{"kind": "valid", "step": [20], "loss": 1}\n'),
    "no kind": _write(b'{"step": 20}\n'),
    "a loss that is text": _write(b'{"kind": "valid", "step": 20, "loss": "low"}\n'),
    "a loss that is a list": _write(
        b'{"kind": "valid", "step": 20, "loss": 1}\n{"kind": "valid", "step": 40, "loss": [1]}\n'
    ),
    "not UTF-8": _write(b'{"kind": "caf\xe9", "step": 20}\n'),
    "deep": _write(b'{"a": ' * _DEEP + b"\n"),
    "a list": _write(b"[1]\n"),
    "a folder": _folder,
}
_CASES = [("config.yaml", name, damage) for name, damage in _YAML.items()]
_CASES += [("summary.json", name, damage) for name, damage in _SUMMARY.items()]
_CASES += [("metrics.jsonl", name, damage) for name, damage in _LINES.items()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    losses = [5.0, 4.0, 3.0, 2.0, 1.0]
    make_run(folder, "a", losses, "method=vanilla", f"run.dir={folder}")
    make_run(folder, "b", losses, f"run.dir={folder}")
    return folder


@pytest.mark.parametrize(("file", "damage"), [pytest.param(f, d, id=f"{f} {name}") for f, name, d in _CASES])
def test_a_comparison_names_the_damaged_file(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    damage(tmp_path / "runs" / "b" / file)
    assert main(["compare", str(tmp_path / "runs" / "a"), str(tmp_path / "runs" / "b"), f"out={tmp_path}"]) in (1, 2)
    error = capsys.readouterr().err
    assert file in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("file", "damage"), [pytest.param(f, d, id=f"{f} {name}") for f, name, d in _CASES if f != "metrics.jsonl"]
)
def test_training_names_the_damaged_file_of_a_finished_run(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "runs" / "b" / "checkpoints" / "100").mkdir(parents=True)
    words = ["train", "train.steps=100", "run.name=b", f"run.dir={tmp_path / 'runs'}", "mesh=single"]
    damage(tmp_path / "runs" / "b" / file)
    assert main(words) in (1, 2)
    error = capsys.readouterr().err
    assert file in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "damage",
    [
        *(pytest.param(damage, id=name) for name, damage in _JSON.items()),
        pytest.param(_write(b'{"expert_devices": 4}'), id="no factor"),
        pytest.param(_write(b'{"expert_devices": "4", "receive_factor": 2}'), id="a wrong type"),
        pytest.param(_write(b'{"expert_devices": 4, "receive_factor": NaN}'), id="not a number"),
        pytest.param(_write(b'{"expert_devices": 4, "receive_factor": -1}'), id="negative"),
    ],
)
def test_damaged_receive_buffers(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    (tmp_path / FILE).write_text('{"expert_devices": 4, "receive_factor": 2.5}')
    assert buffers(tmp_path).factor == 2.5
    damage(tmp_path / FILE)
    with pytest.raises(FileError, match=rf"{FILE}: .*; delete it; loads are then measured again"):
        buffers(tmp_path)


def test_damaged_routing_counts(tmp_path: Path) -> None:
    counts = np.arange(8).reshape(2, 4)
    write_array(tmp_path / "4.npy", counts)
    found = newest_counts(tmp_path, 5)
    assert found is not None
    np.testing.assert_array_equal(found, counts)
    _truncate(tmp_path / "4.npy")
    with pytest.raises(FileError, match=r"4\.npy: not a NumPy array .*delete it"):
        newest_counts(tmp_path, 5)
