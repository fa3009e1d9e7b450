"""The command line of `unipool data`."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import unipool_jax.data
from unipool_jax.cli.main import main
from unipool_jax.data.assets import ASSET_FOLDER, demo_corpus_path
from unipool_jax.data.token_store import open_store

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(unipool_jax.data.__file__).parents[2])}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(10)))
    return path


def test_build_and_verify(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    command = ["data", str(text), f"out={out}", "tokenizer=bytes", "split=[8,1,1]", "workers=1", "progress=false"]
    assert main(command) == 0
    assert "10 documents, 110 tokens (train 88, valid 11, test 11)" in capsys.readouterr().out
    assert main(command) == 0  # already there
    assert main(["data", f"verify={out}"]) == 0
    (out / "document_offsets.npy").write_bytes(bytes((out / "document_offsets.npy").stat().st_size))
    assert main(["data", f"verify={out}"]) == 2


def test_one_store_per_file(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(text, tmp_path / "b.jsonl")
    files = [str(text), str(tmp_path / "b.jsonl")]
    options = [f"out={tmp_path / 'out'}", "tokenizer=bytes", "workers=1", "progress=false", "per_file=true"]
    options.append("split=[8,1,1]")
    assert main(["data", *files, *options]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]
    assert open_store(tmp_path / "out" / "b").num_documents == 10
    (tmp_path / "c").mkdir()
    shutil.copy(text, tmp_path / "c" / "a.jsonl")
    assert main(["data", files[0], f"{tmp_path}/c/a.jsonl", *options]) == 2
    assert "two files have one name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give files and out=FOLDER"),
        (["{text}"], "give files and out=FOLDER"),
        (["{text}", "out={out}", "split=[1,2]"], "split=(1.0, 2.0): must be three"),
        (["{text}", "out={out}", "tokenizer=gpt5"], "tokenizer 'gpt5': choose one of bytes, demo, gpt2"),
        (["{text}", "out={out}", "field=body"], "a.jsonl, line 1: no field 'body'"),
        (["{text}", "out={out}", "workers=0"], "workers=0"),
        (["nothing.jsonl", "out={out}"], "nothing.jsonl: no such file"),
        (["nothing.csv", "out={out}"], "nothing.csv: unknown file format"),
        (["verify={out}"], "neither a token store"),
    ],
)
def test_an_error_is_one_sentence(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    names = {"text": text, "out": tmp_path / "out"}
    workers = [] if "workers=0" in options else ["workers=1"]
    assert main(["data", *(option.format(**names) for option in options), *workers, "progress=false"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == (2 if "1 problem in the command line" in printed.err else 1)
    assert message in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_exits_130_without_a_traceback(tmp_path: Path, workers: str) -> None:
    corpora = []
    for index in range(4):  # enough that the signal arrives in the middle
        corpora.append(str(shutil.copy(demo_corpus_path(), tmp_path / f"{index}.jsonl.xz")))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "unipool_jax", "data", *corpora, f"out={out}", f"workers={workers}"]
    # A shell that runs the tests in the background lets them ignore Ctrl-C, and children inherit that.
    with_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=with_ctrl_c
    )
    while not (tmp_path / "out.building" / "lengths.bin").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends Ctrl-C to the whole group
    _, printed = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted: give the same command again" in printed
    assert "Traceback" not in printed
    assert not out.exists()
    assert not (tmp_path / "out.lock").exists()


def test_packaged_licences_are_there() -> None:
    assert "CC0" in (ASSET_FOLDER / "sotu.LICENSE").read_text()
    assert "MIT License" in (ASSET_FOLDER / "gpt2.LICENSE").read_text()


def test_data_imports_nothing_of_the_model_and_no_optional_package() -> None:
    code = (
        "import sys, unipool_jax.data.command, unipool_jax.data.pipeline, unipool_jax.data.unigram\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('jax', 'flax', 'pyarrow', 'zstandard')]\n"
        "rooms = {m.split('.')[1] for m in sys.modules if m.startswith('unipool_jax.')}\n"
        "bad += sorted(rooms - {'config', 'data'})\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, timeout=60)
