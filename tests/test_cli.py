"""The command line: every command and setting is explained, mistakes are named together, shells can complete."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml

import unipool_jax
from unipool_jax.cli import training
from unipool_jax.cli.commands import COMMANDS, Command
from unipool_jax.cli.completion import SCRIPTS, candidates
from unipool_jax.cli.guard import guarded
from unipool_jax.cli.main import execute, main
from unipool_jax.config.compose import CONFIG_DIR, Choices, choice_files, compose_config, save_config, sweep
from unipool_jax.config.docs import field_docs
from unipool_jax.config.parsing import from_mapping
from unipool_jax.config.ranges import Range
from unipool_jax.config.schema import Config, ConfigError, ModelConfig, MoEConfig, RunConfig, settings
from unipool_jax.config.version import VERSION
from unipool_jax.config.words import Accepts, Composed, Overrides, Positional, Verbatim, fields_of, from_words, to_words

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Inner:
    """Settings of a part."""

    depth: Annotated[int | None, Range(1, 9)] = None
    """How deep."""


@dataclass(frozen=True)
class Request:
    """Does something."""

    place: Annotated[str, Positional()] = "here"
    """Where. Not there."""
    text: Annotated[tuple[str, ...], Positional(), Verbatim()] = ()
    """What is said."""
    parts: tuple[Literal["a", "b"], ...] | None = None
    """Of what."""
    share: Annotated[float, Range(0, 1)] = 0.5
    """How much."""
    loud: bool = False
    """Whether it is heard."""
    inner: Inner | None = None
    overrides: Annotated[Overrides, Accepts("data.", "train.steps")] = ()
    """Settings of the schema."""

    def problems(self) -> Iterator[str]:
        """What does not go together."""
        if self.loud and not self.text:
            yield "loud=true: nothing is said"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], Request()),
        (["there", "one", "two = 2"], Request("there", ("one", "two = 2"))),
        (["text=[x]", "there", "three"], Request("there", ("[x]", "three"))),
        (["text=[x]", "text=-y", "text=a=b"], Request(text=("[x]", "-y", "a=b"))),
        (["place=7", "share=1", "loud=true", "text=a"], Request("7", ("a",), share=1.0, loud=True)),
        (["parts=[a,b]", "depth=3"], Request(parts=("a", "b"), inner=Inner(3))),
        (["parts=a"], Request(parts=("a",))),
        (["parts=null", "depth=null"], Request()),
        (["place=null"], Request("null")),
        (["data.split=[1,2,3]", "train.steps=5"], Request(overrides=(("data.split", (1, 2, 3)), ("train.steps", 5)))),
        (["data.files=['a b',c]"], Request(overrides=(("data.files", ("a b", "c")),))),
    ],
)
def test_words_make_a_request_and_a_request_makes_words(words: list[str], wanted: Request) -> None:
    assert from_words(Request, words) == wanted
    assert from_words(Request, to_words(wanted)) == wanted


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("share=2", "share=2: must be at least 0 and at most 1"),
        ("share=nan", "share=nan: must be"),
        ("share=much", "share='much': expected a number"),
        ("share=1,2", "share=1,2: cannot be read"),
        ("loud=1", "loud=1: expected true or false"),
        ("parts=[a,c]", "parts[1]='c': choose one of a, b"),
        ("parts=[a", "parts=[a: cannot be read; a list is parts=[a,b]"),
        ("parts=[]", "parts=[]: an empty list"),
        ("place=", "place=: empty; Where"),
        ("depth=0", "depth=0: must be at least 1"),
        ("shar=1", "shar=1: not understood; did you mean share?"),
        ("zzz=1", "zzz=1: not understood; use place=, text=, parts=, share=, loud=, depth=, data.NAME=, train.steps="),
        ("train.seed=1", "train.seed=1: not a setting that can be replaced here"),
        ("data.split=7", "data.split=7: expected a list"),
        ("data.num_threads=two", "data.num_threads='two': expected a whole number"),
    ],
)
def test_every_mistake_is_named_together(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_words(Request, [word, "yyy=1"])
    assert len(caught.value.problems) == 2
    assert caught.value.problems[0].startswith(message)


def test_what_does_not_go_together_and_what_is_given_twice() -> None:
    with pytest.raises(ConfigError, match="loud=true: nothing is said"):
        from_words(Request, ["loud=true"])
    with pytest.raises(ConfigError, match="share=2: share is given twice"):
        from_words(Request, ["share=1", "share=2"])


@dataclass(frozen=True, kw_only=True)
class Converted:
    """Makes a model."""

    out: str
    """File to write. It must not exist."""
    config: Annotated[Choices | None, Composed()] = None
    """Its settings."""


def test_a_command_can_compose_a_configuration() -> None:
    assert from_words(Converted, ["out=x"]) == Converted(out="x")
    found = from_words(Converted, ["out=x", "method=vanilla", "pool.groups=3"])
    assert found.config is not None
    assert found.config.words == ("method=vanilla", "pool.groups=3")
    with pytest.raises(ConfigError) as caught:
        from_words(Converted, ["colour=red", "method=vanila"])
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["out=", "colour", "method=vanila"]
    assert caught.value.problems[0] == "out=: missing; File to write"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_lists_every_setting_with_its_docstring(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.name.split(), "--help"]) == 0
    page = capsys.readouterr().out
    words = " ".join(page.split())
    assert page.startswith(f"usage: unipool {command.name}")
    kind = command.load_settings()
    assert kind.__doc__
    assert command.load_function().__doc__
    if kind is Config:
        for name in settings(Config()):
            assert (f"\n  {name}=" in page) == (name != "mode" or command.mode is None)
        for group, files in choice_files().items():
            assert all(f"\n  {group}={name}\n" in page for name in files)
        return
    for field in fields_of(kind):
        assert field_docs(field.owner)[field.name] in words
        assert f"\n  {field.name}=" in page or field.marker(Accepts) is not None or field.marker(Composed) is not None
    for option in command.options:
        assert f"--{option.name}" in page


def test_help_has_defaults_and_allowed_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for shown in (
        f"model.num_layers=12 {field_docs(ModelConfig)['num_layers']} [a whole number, at least 1 and at most 1024]",
        f"moe.router=norm {field_docs(MoEConfig)['router']} [one of none, softmax, sigmoid, norm]",
        "data.split=[969,30,1]",
        "pool.experts=null",
        f"run.tensorboard=true {field_docs(RunConfig)['tensorboard']} [one of true, false]",
        "scale=182m",
        "Section lock: UniPool-lock:",
        "--config-dir DIR",
        "--multirun",
    ):
        assert shown in words


def test_help_of_the_front_and_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    assert all(f"  {command.name} " in page and command.summary in page for command in COMMANDS)
    assert main(["convert", "--help"]) == 0
    assert "convert upcycle" in capsys.readouterr().out
    assert main([]) == main(["convert"]) == 2
    capsys.readouterr()
    assert main(["--help", "eval"]) == 0
    assert capsys.readouterr().out.startswith("usage: unipool eval")
    assert main(["convert", "export", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: unipool convert export [RUN] out=VALUE [NAME=VALUE ...]")
    assert main(["--version"]) == 0
    assert f"unipool_jax {VERSION} (commit " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "trian: no such command; did you mean train?"),
        (["7"], "7: no such command; choose one of train, eval, generate, analyse, compare, convert, prune, data,"),
        (["convert", "exprot"], "exprot: no such command; did you mean export?"),
        (["-V"], "-V: no such option before a command; there are --help and --version"),
        (["--config-dir", "x", "train"], "--config-dir: no such option before a command"),
        (["train", "train.seed=1,2"], "train.seed=1,2: several values; a list is train.seed=[1,2], a text is"),
        (["train", "moe.top_k"], "moe.top_k: no value given; write moe.top_k=VALUE"),
        (["train", "--multirun", "train.seed=range(3,3)"], "train.seed=range(3,3): names no value"),
        (["train", "--multirun", "train.seed=range(0,9999)"], "9,999 combinations of values; at most 1,000"),
        (["eval", "runs/a", "runs/b"], "runs/b: not understood; run= given already; settings are"),
        (["generate", "runs/a", "b=c"], "b=c: not understood; use run="),
        (["generate", "runs/a", "b=c"], "for a value that has an = in it, prompt='b=...'"),
        (["eval", "--step=3"], "--step=3: no such option; there are --help, and settings are NAME=VALUE"),
        (["train", "--config-dir"], "--config-dir: its value is missing; write --config-dir DIR"),
        (["train", "--multirun=3"], "--multirun=3: takes no value"),
        (["train", "--config-dir", "nowhere"], "--config-dir nowhere: no such folder"),
        (["plan", "mode=train"], "mode=train: `unipool plan` says so already"),
        (["describe", "model.num_layrs=3"], "model.num_layrs: no such setting or group; did you mean model.num_layers"),
        (["train", "pool.groups=5", "moe.top_k=100"], "2 problems in the configuration"),
        (["compare", "runs/a"], "1 run folder(s) given"),
        (["completion", "tcsh"], "shell='tcsh': choose one of bash, zsh, fish"),
    ],
)
def test_mistakes_are_sentences_and_exit_with_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    def broken() -> int:
        raise ZeroDivisionError

    def misplaced() -> int:
        (tmp_path / "file" / "run").mkdir()
        return 0

    def refused() -> int:
        raise unipool_jax.UserError("no")

    assert guarded(interrupted) == 130
    assert guarded(lambda: 143) == 143
    assert guarded(refused) == 1
    assert guarded(refused, failure=2) == 2
    with pytest.raises(ZeroDivisionError):
        guarded(broken)
    (tmp_path / "file").touch()
    assert guarded(misplaced) == 1
    assert f"{tmp_path}/file/run: Not a directory; choose another place" in capsys.readouterr().err
    assert main(["eval", "run=nowhere"]) == 1


def test_print_config_is_what_a_run_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "scale=182m", "train.seed=7", "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert from_mapping(printed) == compose_config(["scale=182m", "train.seed=7"])
    assert main(["plan", "--print-config", "--multirun", "mesh=v5e_8"]) == 2
    assert main(["train", "--print-config", "--multirun", "train.seed=1,2", "run.name='s${train.seed}'"]) == 0
    assert [each["run"]["name"] for each in yaml.safe_load_all(capsys.readouterr().out)] == ["s1", "s2"]


def test_a_folder_of_ones_own_choices_is_laid_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "my choices"
    for group, name, text in (
        ("scale", "tiny", "defaults:\n  - demo\n  - _self_\nmodel:\n  num_layers: 2\nscale_name: tiny\n"),
        ("method", "unipool", "loss:\n  pool_coefficient: 0.5\nmethod_name: mine\n"),
    ):
        (mine / group).mkdir(parents=True)
        (mine / group / f"{name}.yaml").write_text(f"# @package _global_\n# My own {name}.\n{text}")
    config = compose_config(["scale=tiny"], mine)
    assert (config.model.num_layers, config.scale_name, config.data.source) == (2, "tiny", "demo")
    assert (config.method_name, config.loss.pool_coefficient) == ("mine", 0.5)  # the user's file wins
    assert compose_config(["method=vanilla"], mine).method_name == "vanilla"  # the shipped ones are still there
    with pytest.raises(ConfigError, match=r"scale=huge: no such choice; choose one of 182m, .*, tiny"):
        compose_config(["scale=huge"], mine)
    assert main(["train", "--config-dir", str(mine), "scale=tiny", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["scale_name"] == "tiny"
    assert main(["train", f"--config-dir={mine}", "--help"]) == 0
    assert "scale=tiny\n      My own tiny." in capsys.readouterr().out


def test_names_that_are_not_utf8_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"caf\xe9")
    for words in (["train", f"run.name={name}"], ["eval", f"run={name}"], ["data", "build", f"files=[{name}.txt]"]):
        assert main(words) == 2
        assert r"caf\udce9" in (error := capsys.readouterr().err)
        assert "not UTF-8; rename" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"# @package _global_\nmodel: [", "not YAML"),
        (b"\xff", "not UTF-8"),
        (b"# @package _global_\n- 1", "expected settings"),
        (b"model: {num_layers: 3}", "its first line must be `# @package _global_`"),
        (
            b"# @package _global_\nmodel: {num_layer: 3}",
            "model.num_layer: no such setting; did you mean model.num_layers?",
        ),
    ],
)
@pytest.mark.parametrize("words", [["--help"], ["--print-config"], ["scale=mine"], ["--multirun", "train.seed=1,2"]])
def test_a_broken_folder_of_choices_is_named(
    words: list[str], text: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "scale" / "mine.yaml"
    file.parent.mkdir()
    file.write_bytes(text)
    assert main(["train", "--config-dir", str(tmp_path), *words]) == 2
    assert f"{file}: {message}" in capsys.readouterr().err
    assert main(["train", "--config-dir", str(file), *words]) == 2
    assert f"--config-dir {file}: no such folder" in capsys.readouterr().err


def test_a_sweep_is_every_combination() -> None:
    assert sweep(["train.seed=1,2", "method=vanilla", "pool.groups=range(1,3)"]) == [
        ["train.seed=1", "method=vanilla", "pool.groups=1"],
        ["train.seed=1", "method=vanilla", "pool.groups=2"],
        ["train.seed=2", "method=vanilla", "pool.groups=1"],
        ["train.seed=2", "method=vanilla", "pool.groups=2"],
    ]
    assert sweep(["method=glob(shared_*)"]) == [["method=shared_layer_aux"], ["method=shared_pool_aux"]]
    assert sweep(["run.name='${method_name}-a'"]) == [["run.name='${method_name}-a'"]]
    with pytest.raises(ConfigError) as caught:
        sweep(["train.seed=interval(1,2)", "train.steps"])
    assert len(caught.value.problems) == 2


def test_multirun_checks_all_before_it_starts_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[Config] = []

    def start(config: Config) -> int:
        started.append(config)
        return 3 if config.train.seed == 2 else 0

    monkeypatch.setattr(training, "start", start)
    line = ["train", "--multirun", "train.seed=1,2,3", "run.name='${method_name}-${train.seed}'"]
    assert main([*line, "pool.groups=1,5"]) == 2
    assert started == []
    printed = capsys.readouterr().err
    assert printed.startswith("9 problems")  # two reasons against each of three pools, and three shared folders
    assert "train.seed=1 pool.groups=5: pool.groups=5: " in printed
    assert "train.seed=1 pool.groups=5: its run folder runs/unipool-1 is that of train.seed=1 pool.groups=1" in printed
    assert main(line) == 3
    assert [config.run.name for config in started] == ["unipool-1", "unipool-2"]
    output, errors = capsys.readouterr()
    assert "run 2 of 3: train.seed=2" in output
    assert "exit code 3: the 1 runs after this one were not started" in errors


def test_multirun_looks_into_the_folders_before_it_starts_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[Config] = []

    def start(config: Config) -> int:
        started.append(config)
        return 0

    monkeypatch.setattr(training, "start", start)
    line = ["train", "--multirun", "train.seed=1,2,3", "run.name='s${train.seed}'", f"run.dir={tmp_path}"]
    (tmp_path / "s3" / "checkpoints" / "5").mkdir(parents=True)
    save_config(
        compose_config(["train.seed=3", "run.name=s3", f"run.dir={tmp_path}", "train.steps=7"]),
        tmp_path / "s3" / "config.yaml",
    )
    assert main(line) == 2
    assert f"train.seed=3: {tmp_path / 's3'} holds a run with other settings:\n  - train.steps: 7 there" in (
        capsys.readouterr().err
    )
    assert main([*line, "run.resume=required"]) == 2
    assert "train.seed=1: run.resume=required, but " in capsys.readouterr().err
    assert started == []
    assert main([*line, "train.steps=7"]) == 0
    assert len(started) == 3
    assert not (tmp_path / "s1").exists()


def test_completion_knows_the_choices_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "scale").mkdir()
    (tmp_path / "scale" / "mine.yaml").write_text("# @package _global_\n")
    for option in (f"--config-dir {tmp_path}", f"--config-dir={tmp_path}"):
        assert "scale=mine" in candidates(f"unipool train {option} scale=")
    assert candidates("unipool train scale=mi") == []


@pytest.mark.parametrize(
    ("line", "some", "none"),
    [
        ("unipool ", ["train ", "convert ", "--help "], ["export "]),
        ("unipool con", ["convert "], ["train "]),
        ("unipool convert ", ["export ", "import ", "upcycle "], ["train "]),
        ("unipool train me", ["mesh=", "method=", "mesh.data="], ["model.num_layers="]),
        ("unipool train method=", ["method=unipool", "method=dense"], []),
        ("unipool train scale=182m moe.router=s", ["moe.router=softmax", "moe.router=sigmoid"], ["moe.router=norm"]),
        ("unipool train run.tensorboard=", ["run.tensorboard=true", "run.tensorboard=false"], []),
        ("unipool train --", ["--multirun ", "--config-dir "], []),
        ("unipool plan mo", ["model.num_layers="], ["mode="]),
        ("unipool eval ", ["run=", "splits=", "data.files=", "runs/a ", "latest "], ["train.steps="]),
        ("unipool eval run=", ["run=runs/a", "run=latest"], []),
        ("unipool analyse split=", ["split=valid"], []),
        ("unipool convert upcycle method=", ["method=vanilla"], []),
        ("unipool completion ", ["bash ", "zsh ", "fish "], []),
        ('unipool generate "The st', [], ["run="]),
    ],
)
def test_completion(
    line: str, some: list[str], none: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    found = candidates(line)
    assert set(some) <= set(found)
    assert not set(none) & set(found)


def test_bash_completes_with_the_script(tmp_path: Path) -> None:
    (tmp_path / "unipool").write_text(f'#!/bin/bash\nPYTHONPATH={ROOT} exec {sys.executable} -m unipool_jax "$@"\n')
    (tmp_path / "unipool").chmod(0o755)
    script = SCRIPTS["bash"] + (
        f'PATH="{tmp_path}:$PATH"\n'
        'for COMP_LINE in "unipool train moe.router=so" "unipool conv" "unipool train scale=182m mesh.tran"; do\n'
        '  COMP_POINT=${#COMP_LINE}; _unipool; echo "${COMPREPLY[@]}"\n'
        "done\n"
    )
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.splitlines() == ["softmax", "convert ", "mesh.transport="]
    assert shown.stderr == ""


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["completion", "words", "unipool train m"]])
def test_help_and_completion_do_not_import_jax(words: list[str]) -> None:
    code = f"import sys; from unipool_jax.cli.main import main; main({words!r}); sys.exit('jax' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_training_speaks_before_it_imports_what_takes_seconds() -> None:
    """Nor does it import PyTorch later, where that is installed beside TensorBoard's writer."""
    slow = {"jax", "flax", "orbax", "scipy", "tensorboardX", "torch"}
    code = (
        "import io, sys, unipool_jax.cli.main\n"
        f"slow = {slow}\n"
        "class First(io.StringIO):\n"
        "    def write(self, text):\n"
        "        print(text.strip(), *sorted(slow & set(sys.modules)), sep='|', file=sys.__stdout__)\n"
        "        raise SystemExit\n"
        "sys.stdout = First()\n"
        "try:\n"
        "    unipool_jax.cli.main.main(['train', 'run.dir=/nowhere', 'run.name=a'])\n"
        "except SystemExit:\n"
        "    pass\n"
        "import tempfile, pathlib, unipool_jax.training.loop as loop\n"
        "writer = loop.MetricsWriter(pathlib.Path(tempfile.mkdtemp()), 0, tensorboard=True)\n"
        "print(*sorted(slow & set(sys.modules)), sep='|', file=sys.__stdout__)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert ended.stdout.splitlines() == ["/nowhere/a: starting", "flax|jax|orbax|tensorboardX"]


def test_a_reader_that_has_seen_enough_ends_a_command_in_silence() -> None:
    """`unipool ... | head`."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "unipool_jax", "--version"]
    ended = subprocess.run(words, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_there_is_no_other_command_line() -> None:
    """Words are read in one place; whatever else reads them would be a second style."""
    for path in (ROOT / "unipool_jax").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "argparse" not in source, path
        assert "__main__" not in source or path.name == "__main__.py", path
        assert "sys.argv" not in source or path.parent.name == "cli", path


@pytest.mark.parametrize(("door", "words"), [("train.py", ["mode=describe"]), ("eval.py", ["--help"])])
def test_the_doors_of_the_checkout(door: str, words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / door), *words]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    assert re.search("parameters|usage: unipool eval", ended.stdout)
    assert list(tmp_path.iterdir()) == []


def test_the_commands_of_the_issue_are_there() -> None:
    assert {command.name.split()[0] for command in COMMANDS} >= {
        *("train", "eval", "generate", "analyse", "compare", "convert", "data", "plan", "describe"),
    }


def test_the_face_composes_and_refuses(tmp_path: Path) -> None:
    config = unipool_jax.compose("scale=182m", "method=unipool", "mode=describe")
    assert config.total_experts == 96
    with pytest.raises(unipool_jax.ConfigError, match=r"pool\.groups=5"):
        unipool_jax.compose("pool.groups=5")
    for refused in (unipool_jax.evaluate, unipool_jax.analyse):
        with pytest.raises(unipool_jax.ConfigError, match="tasks=: not measured here"):
            refused("latest", "tasks=paper")
    assert all(getattr(unipool_jax, name).__doc__ for name in unipool_jax.__all__ if name != "__version__")


def test_importing_the_package_is_light() -> None:
    code = "import sys, unipool_jax; sys.exit(len({'jax', 'numpy', 'hydra'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_choices_are_found_in_the_checkout() -> None:
    assert CONFIG_DIR == ROOT / "configs"
    assert dataclasses.asdict(compose_config(["scale=182m"]))["scale_name"] == "182m"
    assert execute(["describe", "scale=demo", "--print-config"]) == 0
