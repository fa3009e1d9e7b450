"""Default names of runs, and runs named on command lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import unipool_jax
from unipool_jax.cli.commands import COMMANDS
from unipool_jax.cli.main import execute
from unipool_jax.cli.runs import take_run
from unipool_jax.cli.training import configured
from unipool_jax.config.compose import compose_config, load_config, save_config
from unipool_jax.config.schema import ConfigError, DistributedConfig
from unipool_jax.config.words import Positional, fields_of, from_words
from unipool_jax.evaluation.requests import GenerateRequest
from unipool_jax.training.run_folder import RunError, find_run
from unipool_jax.training.run_names import run_folder, run_name


def name(*words: str) -> str:
    return run_name(compose_config(words))


def test_the_demo_is_one_run_whoever_starts_it() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    (command,) = [line.split("train.py")[1] for line in makefile.splitlines() if "train.py" in line]
    assert name(*command.split()) == name() == "demo"
    assert name("mesh.data=1", "train.log_every=5", "data.num_threads=1") == "demo"  # no other numbers
    assert name("optimizer.learning_rate=1e-3") == "demo-unipool-280steps-seed1234"
    assert name("train.seed=5") == "demo-unipool-280steps-seed5"
    assert name("method=vanilla", "run.name=mine") == "mine"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a/book.txt", "b/book.txt"),
        ("book.txt", "book.md"),
        ("book.txt", "./deep/../deep/book.txt"),
        ("texts", "texts/*.md"),
        ("a.txt,b.txt", "b.txt,a.txt"),
        ("a.txt", "a.txt,b.txt"),
        ("'été.txt'", "'etat.txt'"),
    ],
)
def test_two_texts_have_two_names(one: str, other: str) -> None:
    names = [name("data=text", f"data.files=[{files}]") for files in (one, other)]
    assert names[0] != names[1]
    stores = [name("data=pile", f"data.stores=[{files}]") for files in (one, other)]
    assert stores[0] != stores[1]


def test_a_name_is_readable_and_does_not_depend_on_spelling() -> None:
    begin = "demo-unipool-280steps-seed1234"
    assert name("data=text", "data.files=[book.txt]") == name("data=text", "data.files=[./book.txt]")
    assert name("data=text", "data.files=[book.txt]") == f"{begin}-book.txt"
    assert name("data=text", "data.files=['my texts/**/*.md']").startswith(f"{begin}-my-texts-")
    assert name("data=pile", "data.stores=[stores/pile,stores/web]").startswith(f"{begin}-pile-")
    assert name("data=text", "data.files=[../..]").startswith(f"{begin}-text-")
    assert name("run.init_from=runs/parent") == f"{begin}-from-parent"
    assert name("run.init_from=runs/parent/checkpoints/200") == f"{begin}-from-parent-200"


def test_a_run_under_the_name_without_its_text_is_found(tmp_path: Path) -> None:
    config = compose_config(["data=text", "data.files=[book.txt]", f"run.dir={tmp_path}"])
    assert run_folder(config) == tmp_path / "demo-unipool-280steps-seed1234-book.txt"
    before = tmp_path / "demo-unipool-280steps-seed1234"
    before.mkdir()
    save_config(config, before / "config.yaml")
    assert run_folder(config) == before
    # Not for other text, and not where there is a run of the new name.
    other = compose_config(["data=text", "data.files=[other.txt]", f"run.dir={tmp_path}"])
    assert run_folder(other) == tmp_path / "demo-unipool-280steps-seed1234-other.txt"
    newer = tmp_path / "demo-unipool-280steps-seed1234-book.txt"
    newer.mkdir()
    save_config(config, newer / "config.yaml")
    assert run_folder(config) == newer


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder without checkpoints, of other settings than the shipped ones."""
    monkeypatch.chdir(tmp_path)
    words = ["method=vanilla", "train.seed=7", "run.resume=never", "distributed.coordinator=host:1", "run.name=other"]
    folder = Path("runs/x")
    folder.mkdir(parents=True)
    save_config(compose_config(words), folder / "config.yaml")
    return folder


@pytest.mark.parametrize("words", [["runs/x"], ["run=runs/x"], ["x"], ["run=x"], ["train.log_every=10", "runs/x"]])
def test_a_run_gives_its_settings(run: Path, words: list[str]) -> None:
    config = configured([*words, "train.keep_checkpoints=9"], None, None)
    assert (config.method_name, config.train.seed, config.train.keep_checkpoints) == ("vanilla", 7, 9)
    assert run_folder(config) == run
    assert (config.run.resume, config.distributed, config.mode) == ("auto", DistributedConfig(), "train")


def test_paths_of_a_run_are_found_from_another_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("book.txt").write_text("text")
    save_config(compose_config(["data=text", "data.files=[book.txt]"]), run / "config.yaml")
    assert configured(["runs/x"], None, None).data.files == ("book.txt",)
    above = Path.cwd()
    (above / "elsewhere").mkdir()
    monkeypatch.chdir(above / "elsewhere")
    assert configured(["../runs/x"], None, None).data.files == (str(above / "book.txt"),)


def test_naming_a_run_needs_no_jax(run: Path) -> None:
    code = (
        "import sys; from unipool_jax.cli.training import configured\n"
        "configured(['runs/x'], None, None); sys.exit('jax' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(unipool_jax.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


def test_plan_and_describe_take_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["describe", "runs/x"]) == 0
    of_run = capsys.readouterr().out
    assert execute(["describe", "method=vanilla"]) == 0
    assert capsys.readouterr().out == of_run
    config = configured(["runs/x", "mesh=v5p_64", "train.steps=+5"], None, "plan")
    assert (config.mode, config.mesh.topology, config.train.seed) == ("plan", "v5p:4x4x4", 7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/x", "runs/y"], "runs/x, runs/y: one run can be named"),
        (["runs/x", "run=runs/y"], "one run can be named"),
        (["--multirun", "runs/x", "train.seed=1,2"], "--multirun trains new runs"),
        (["runs/x", "mode=plan"], "use `unipool plan runs/x`"),
        (["runs/x", "trian.steps=9"], "did you mean train.steps"),
    ],
)
def test_what_is_wrong_beside_a_run(run: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        execute(["train", *words])


def test_every_command_that_reads_runs_takes_them_first() -> None:
    for command in COMMANDS:
        fields = [] if command.composes else fields_of(command.load_settings())
        names = [field.name for field in fields if field.marker(Positional)]
        others = ("convert import", "aptitude anchors")  # the one makes a run, the other needs none
        if any(field.name in ("run", "runs") for field in fields) and command.name not in others:
            assert names[0] in ("run", "runs"), command.name
    assert [command.name for command in COMMANDS if command.composes] == ["train", "plan", "describe"]


def test_names_that_are_no_runs(run: Path) -> None:
    with pytest.raises(RunError, match="run=metod: no run here"):
        configured(["metod"], None, None)
    words = ["train.steps", "~data", "model", "mesh=auto"]
    assert take_run(words) == (None, words)
    Path("x").mkdir()
    save_config(compose_config(), Path("x/config.yaml"))
    with pytest.raises(RunError, match=r"both \./x and runs/x are runs"):
        find_run("x")
    assert load_config(find_run(f"{Path.cwd()}/x") / "config.yaml") == compose_config()


def test_a_prompt_in_the_place_of_the_run_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"'My fellow': taken for the run, .*prompt='My fellow'"):
        from_words(GenerateRequest, ["My fellow"])
