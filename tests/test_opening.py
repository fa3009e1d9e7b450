"""Runs that moved, other working folders, and what a converted run takes over from its parent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from runner import overrides, write_text
from unipool_jax.cli.main import execute, main
from unipool_jax.cli.runs import run_config
from unipool_jax.config.compose import Choices, compose_config, differences, load_config
from unipool_jax.config.schema import Config
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.inheritance import imported_config, upcycled_config
from unipool_jax.data.assets import read_asset
from unipool_jax.evaluation.generate import generate_texts
from unipool_jax.evaluation.requests import GenerateRequest
from unipool_jax.training import loop
from unipool_jax.training.checkpoint import Checkpoints
from unipool_jax.training.opening import opened_config
from unipool_jax.training.run_folder import RunError

pytestmark = [pytest.mark.usefixtures("steps_are_shared"), pytest.mark.filterwarnings("ignore:NormRouter over")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which a dense model was trained, in relative paths, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("project")
    write_text(folder / "text.jsonl")
    (folder / "mine.json").write_bytes(read_asset("demo_tokenizer.json"))
    words = [word for word in overrides(folder, "train.steps=2") if word.partition("=")[0] not in _OWN]
    words += ["method=dense", "data.files=[text.jsonl]", "data.cache_dir=cache", "data.tokenizer=mine.json"]
    words += ["run.dir=runs", "run.name=dense", "model.vocab_size=8192", "optimizer.beta1=0.5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert loop.train(compose_config(words)) == 0
    return folder


_OWN = ("method", "moe.experts_per_layer", "data.files", "data.cache_dir", "data.tokenizer", "run.dir", "run.name")


def meta_of(run: Path) -> dict[str, Any]:
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.meta(checkpoints.find(None))


def evaluated(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert execute(["eval", str(run), *words]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_run_is_used_from_anywhere(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From another folder; with its project moved; and alone, its project gone, as far as it needs no text."""
    monkeypatch.chdir(trained)
    here = evaluated(Path("runs/dense"), capsys)
    assert here["own_text"] is True
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.jsonl", documents=41)  # a file of the same name is not the run's
    assert evaluated(trained / "runs" / "dense", capsys) == here
    shutil.copytree(trained, tmp_path / "moved")
    moved = opened_config(tmp_path / "moved" / "runs" / "dense", meta_of(tmp_path / "moved" / "runs" / "dense"))
    assert moved.data.files == (str(tmp_path / "moved" / "text.jsonl"),)
    assert moved.data.cache_dir == str(tmp_path / "moved" / "cache")
    assert moved.data.tokenizer == str(tmp_path / "moved" / "runs" / "dense" / "tokenizer.json")
    assert (moved.run.dir, moved.run.name) == (str(tmp_path / "moved" / "runs"), "dense")
    alone = shutil.move(tmp_path / "moved" / "runs" / "dense", tmp_path / "alone")
    shutil.rmtree(tmp_path / "moved")
    assert opened_config(Path(alone), meta_of(Path(alone))).data.files == (str(trained / "text.jsonl"),)
    meta = meta_of(Path(alone)) | {"started_in": str(tmp_path / "gone")}
    assert opened_config(Path(alone), meta).data.files == ("text.jsonl",)
    assert len(generate_texts(GenerateRequest(str(alone), ("pool",), max_tokens=2))) == 1
    other = evaluated(Path(alone), capsys, f"data.files=[{tmp_path / 'text.jsonl'}]")
    assert other["own_text"] is False
    assert list(other["results"]) == ["text"]


def test_a_run_goes_on_by_name_from_another_folder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished or not, with its own text and tokenizer, though files of the same names lie in the working folder."""
    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text("{}")
    run = tmp_path / "project" / "runs" / "dense"
    assert main(["train", str(run)]) == 0
    assert "is finished" in capsys.readouterr().out
    config = run_config(str(run), [], None, "train")
    assert config.data.files == (str(tmp_path / "project" / "text.jsonl"),)
    assert config.data.tokenizer == str(run / "tokenizer.json")
    (run / "summary.json").unlink()
    assert main(["train", str(run)]) == 0
    assert (run / "summary.json").exists()


def test_evaluation_says_when_the_text_is_another(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    text = Path("text.jsonl")
    text.write_bytes(text.read_bytes().replace(b"router", b"retuor"))
    assert execute(["eval", "runs/dense", "splits=[valid]"]) == 0
    found = capsys.readouterr()
    assert "this is not the text that the run was trained beside" in found.err
    assert "text.jsonl: fingerprint" in found.err
    assert json.loads(found.out.splitlines()[-1])["own_text"] is False


def test_an_upcycled_run_reads_what_its_parent_read(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    words = ["runs/dense", "method=vanilla", "moe.experts_per_layer=4"]
    assert main(["convert", "upcycle", *words, "out=runs/moe"]) == 0
    assert "its text is text.jsonl" in capsys.readouterr().out
    parent, child = (load_config(Path("runs") / name / "config.yaml") for name in ("dense", "moe"))
    decided = {"moe.router", "moe.experts_per_layer", "moe.top_k", "pool.groups", "loss.balance", "method_name"}
    assert set(differences(parent, child)) <= decided | {"run.name", "data.tokenizer"}
    assert child.data.tokenizer == "runs/moe/tokenizer.json"
    assert meta_of(Path("runs/moe"))["text"] == meta_of(Path("runs/dense"))["text"]
    # Other text that is named is a decision; the old name with another text is not.
    assert main(["convert", "upcycle", *words, "out=runs/other", "data.files=[new.jsonl]"]) == 0
    assert "its text is new.jsonl" in capsys.readouterr().out
    assert "text" not in meta_of(Path("runs/other"))
    text = Path("text.jsonl")
    text.write_bytes(text.read_bytes().replace(b"router", b"retuor"))
    with pytest.raises(RunError, match="another text"):
        loop.train(child)


def test_a_file_carries_what_a_run_needs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported here, imported where neither the tokenizer nor the text is."""
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "export", str(trained / "runs" / "dense"), "out=m.safetensors"]) == 0
    assert main(["convert", "import", "m.safetensors", "run=runs/b", "train.steps=7"]) == 0
    config, parent = load_config("runs/b/config.yaml"), load_config(trained / "runs" / "dense" / "config.yaml")
    assert (config.train.steps, config.optimizer, config.train.batch_size) == (7, parent.optimizer, 4)
    assert config.data.tokenizer == "runs/b/tokenizer.json"
    assert meta_of(Path("runs/b"))["text"] == meta_of(trained / "runs" / "dense")["text"]
    Path("runs/b").rename("c")
    assert len(generate_texts(GenerateRequest("c", ("pool",), max_tokens=2))) == 1


PARENT = [
    *("method=unipool_lock", "data=text", "data.files=[a.txt]", "data.tokenizer=bytes", "data.sequence_length=32"),
    *("train.steps=77", "train.batch_size=24", "optimizer.beta1=0.5", "mesh=single", "model.ffn_size=96"),
    *("lock.lock_step=40", "loss.pool_statistics=previous", "moe.experts_per_layer=4", "moe.top_k=2"),
]


@pytest.mark.parametrize(
    ("parent", "words", "decided"),
    [
        (
            PARENT,
            ["method=vanilla_normrouter"],
            {"method_name", "pool.groups", "loss.balance", "loss.pool_statistics", "lock.ownership", "lock.lock_step"},
        ),
        (PARENT, ["pool.groups=2"], {"pool.groups"}),
        (PARENT, ["data=demo"], {"data.source", "data.files", "data.tokenizer"}),
        (PARENT, ["data.source=stores", "data.stores=[s]"], {"data.source", "data.files", "data.stores"}),
        (PARENT, ["mesh=auto"], {"mesh.data"}),
        # A published scale chooses the Pile for a new run, not for a converted one.
        (
            ["scale=182m", "method=dense", *PARENT[1:8]],
            ["scale=182m", "method=unipool"],
            {"method_name", "moe.router", "moe.experts_per_layer", "pool.groups", "loss.balance"},
        ),
    ],
)
def test_only_what_is_named_changes(parent: list[str], words: list[str], decided: set[str]) -> None:
    config = compose_config(parent)
    assert set(differences(config, upcycled_config(config, Choices(tuple(words))))) == decided


def test_a_dense_parent_gets_the_experts_of_its_scale() -> None:
    dense = compose_config(["method=dense", "data=text", "data.files=[a.txt]"])
    assert upcycled_config(dense, Choices(("method=unipool",))).moe.experts_per_layer == 8
    assert upcycled_config(dense, Choices(("method=unipool", "moe.experts_per_layer=2"))).moe.experts_per_layer == 2


def test_a_file_that_describes_its_model_takes_everything_else() -> None:
    described = Config()
    found = imported_config(described, Choices(("data=text", "data.files=[a.txt]", "train.steps=9")), "x.gguf")
    assert (found.data.files, found.train.steps, found.model) == (("a.txt",), 9, described.model)
    with pytest.raises(ConversionError, match=r"leave out what changes moe\.router"):
        imported_config(described, Choices(("moe.router=softmax",)), "x.gguf")
