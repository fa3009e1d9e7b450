"""Interrupted builds: a store is complete or absent, and finished work is kept."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from store_fixtures import SHARD, Corpus, build, make_corpus, tree
from unipool_jax.config import files as config_files
from unipool_jax.data import token_store
from unipool_jax.data.errors import DataError
from unipool_jax.data.store_reader import building_folder
from unipool_jax.data.token_store import open_store


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path)


class Crash(BaseException):
    """Not an Exception, so nothing in the build can handle it, as nothing handles SIGKILL."""


def test_resume_after_a_crash_at_every_durable_write(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, _ = corpus
    expected = tree(build(files, tmp_path / "whole").path)
    real, calls, fatal = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}, [0], [0]

    def crashing(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == fatal[0]:
                raise Crash
            return real[name](*args)

        return call

    for name in real:
        monkeypatch.setattr(os, name, crashing(name))
    out = tmp_path / "out"
    finished = False
    while not finished:
        fatal[0] += 1
        calls[0] = 0
        try:
            build(files, out)
            finished = True
        except Crash:
            # What exists now is either complete or not called a store.
            if not out.exists():
                with pytest.raises(DataError, match="interrupted"):
                    open_store(out)
            calls[0] = -(10**9)
            build(files, out)  # resumes
        assert tree(out) == expected
        assert not building_folder(out).exists()
        assert not out.with_name("out.lock").exists()
        shutil.rmtree(out)
    assert fatal[0] > 30  # several shards, the offsets, the manifest and the final rename


def test_two_crashes_in_one_build(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, _ = corpus
    expected = tree(build(files, tmp_path / "whole").path)
    real, count = config_files.write_atomically, [0]

    def crashing(path: Path, content: bytes) -> None:
        real(path, content)
        count[0] += 1
        if count[0] in (2, 5):
            raise Crash

    monkeypatch.setattr(config_files, "write_atomically", crashing)
    for _ in range(2):
        with pytest.raises(Crash):
            build(files, tmp_path / "out")
    assert tree(build(files, tmp_path / "out").path) == expected


_KILLED = """
import os, signal, sys
from unipool_jax.config import files
from unipool_jax.data import store_format, token_store
real, count = files.write_atomically, [0]
def killing(path, content):
    real(path, content)
    count[0] += 1
    if count[0] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    files.write_atomically = token_store.write_atomically = killing
    token_store.build_store(
        sys.argv[2:], sys.argv[1], "bytes", progress=False, workers=2, shard_tokens=store_format.CHUNK_TOKENS
    )
"""


def test_killed_process_resumes_from_its_last_shard(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, _ = corpus
    expected = tree(build(files, tmp_path / "whole").path)
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(_KILLED)
    environment = os.environ | {"PYTHONPATH": str(Path(token_store.__file__).parents[2])}
    process = subprocess.run([sys.executable, script, out, *files], env=environment, check=False, timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    journal = json.loads((building_folder(out) / "journal.json").read_text())
    assert len(journal["shards"]) == 3
    encoded, real = [], token_store._encode

    def recording(*args: Any) -> Any:
        encoded.append(args)
        return real(*args)

    monkeypatch.setattr(token_store, "_encode", recording)
    assert tree(build(files, out).path) == expected
    # The first shards' documents were not tokenized again.
    assert encoded[0][3][0][0] > 3


def test_ctrl_c_is_clean_and_resumable(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = token_store._encode, [0]

    def interrupted(*args: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(token_store, "_encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(corpus[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    store = build(corpus[0], tmp_path / "out")
    assert store.num_documents == len(corpus[1])


def test_interrupted_build_of_something_else_is_kept(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, _ = corpus
    monkeypatch.setattr(token_store.StoreWriter, "finish", lambda *_: (_ for _ in ()).throw(Crash()))
    with pytest.raises(Crash):
        build(files, tmp_path / "out")
    monkeypatch.undo()
    before = tree(building_folder(tmp_path / "out"))
    with pytest.raises(DataError, match="interrupted build from other inputs"):
        build(files[:1], tmp_path / "out")
    with pytest.raises(DataError, match="interrupted build from other inputs"):
        build(files, tmp_path / "out", "demo")
    assert tree(building_folder(tmp_path / "out")) == before


def test_bad_line_can_be_mended_and_built(corpus: Corpus, tmp_path: Path) -> None:
    files, texts = corpus
    good = files[2].read_bytes()
    files[2].write_bytes(good + b'{"txet": "x"}\n')
    for _ in range(2):
        with pytest.raises(DataError, match=r"2\.jsonl, line 3: no field 'text'"):
            build(files, tmp_path / "out", shard_tokens=SHARD * 64)
    assert not (tmp_path / "out").exists()
    files[2].write_bytes(good)
    assert build(files, tmp_path / "out", shard_tokens=SHARD * 64).num_documents == len(texts)


def test_error_in_a_worker_process_names_the_line(corpus: Corpus, tmp_path: Path) -> None:
    files, _ = corpus
    files[1].write_bytes(files[1].read_bytes() + b"oops\n")
    with pytest.raises(DataError, match=r"1\.jsonl, line 7: not a JSON object"):
        build(files, tmp_path / "out", workers=2)


def test_full_disk_is_a_clean_error_and_resumable(corpus: Corpus, tmp_path: Path) -> None:
    # A limit on file sizes fails writes half-way, as a full disk does.
    files, _ = corpus
    code = (
        "import sys; from unipool_jax.data.token_store import build_store\n"
        "from unipool_jax.data.errors import DataError\n"
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))\n"
        f"try: build_store(sys.argv[2:], sys.argv[1], 'bytes', progress=False, shard_tokens={SHARD})\n"
        "except DataError as error: print(error); sys.exit(7)"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    out = tmp_path / "out"
    process = subprocess.run(
        [sys.executable, "-c", code, out, *files],
        env=os.environ | {"PYTHONPATH": str(Path(token_store.__file__).parents[2])},
        check=False,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 7, process.stderr
    assert "cannot be written" in process.stdout
    assert "free some space" in process.stdout
    assert not out.exists()
    assert build(files, out).num_documents == len(corpus[1])


def test_dead_worker_is_a_clear_error_and_resumable(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, texts = corpus

    def kill_workers(*_: object) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    monkeypatch.setattr(token_store.StoreWriter, "append", kill_workers)
    with pytest.raises(DataError, match=r"a worker process died.* fewer than 2 workers"):
        build(files * 5, tmp_path / "out", workers=2)
    monkeypatch.undo()
    assert build(files, tmp_path / "out").num_documents == len(texts)
