"""The built wheel, installed in an environment of its own, does everything from an empty folder.

The environment sees the libraries of this one, but not the package: its sources are copied away, built, and the tests
of this file make sure that what runs is what was installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy
import pytest

from runner import write_text
from unipool_jax.config.version import VERSION

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("unipool_jax", "configs", "setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE")
_TINY = (
    "method=unipool model.num_layers=2 model.hidden_size=16 model.num_heads=2 model.num_kv_heads=1 model.ffn_size=16 "
    "model.vocab_size=257 moe.experts_per_layer=2 model.init_std=0.1 data=text data.files=[text.jsonl] "
    "data.tokenizer=bytes data.sequence_length=16 train.batch_size=4 train.microbatch_size=4 train.eval_batch_size=4 "
    "train.eval_batches=1 train.eval_every=0 train.steps=4 train.checkpoint_every=0 loss.switch_group_sequences=4 "
    "run.tensorboard=false mesh=single"
)
TINY = _TINY.split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources that is a checkout with one commit."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        origin = ROOT / name
        if origin.is_dir():
            shutil.copytree(origin, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, source / name)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], cwd=source, check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(out), "."], cwd=source, check=True, timeout=120)
    (built,) = out.glob("*.whl")
    return built


class Installed:
    """The package in an environment and a folder of its own."""

    def __init__(self, wheel: Path, environment: Path, folder: Path):
        self.folder = folder
        venv.create(environment, symlinks=True)
        self.programs = environment / "bin"
        (packages,) = environment.glob("lib/python*/site-packages")
        pip = [sys.executable, "-m", "pip", "--python", str(self.programs / "python"), "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, timeout=120)
        # The libraries of this environment, after its own packages.
        (packages / "libraries.pth").write_text(f"{Path(numpy.__file__).parents[1]}\n")
        self.packages = packages
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace("_device_count=8", "_device_count=1"),
            # Commands that compile the same program do it once.
            "JAX_COMPILATION_CACHE_DIR": str(environment / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def __call__(self, *words: str) -> str:
        """What `unipool WORDS` prints; it has to succeed."""
        return self.run("unipool", *words)

    def run(self, *command: str) -> str:
        """What a command prints; it has to succeed."""
        ended = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout


@pytest.fixture(scope="module")
def unipool(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The command, with a run of four steps behind it."""
    installed = Installed(wheel, tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("empty"))
    write_text(installed.folder / "text.jsonl")
    installed("train", *TINY, "run.name=tiny")
    assert {path.name for path in installed.folder.iterdir()} == {"text.jsonl", "runs", ".cache"}
    return installed


def test_the_wheel_holds_the_sources_the_choices_and_the_assets(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = (("unipool_jax", "unipool_jax"), ("configs", "unipool_jax/configs"))
    files = [
        (path, f"{there}/{path.relative_to(ROOT / here)}")
        for here, there in folders
        for path in (ROOT / here).rglob("*")
    ]
    wanted = {name for path, name in files if path.is_file() and path.suffix != ".pyc"}
    assert wanted | {"unipool_jax/COMMIT"} == {name for name in names if name.startswith("unipool_jax/")}
    assert not [name for name in names if not name.startswith(("unipool_jax/", f"unipool_jax-{VERSION}.dist-info/"))]


def test_what_runs_is_what_was_installed(unipool: Installed) -> None:
    assert unipool("--version").startswith(f"unipool_jax {VERSION} (commit ")
    assert unipool.run("python", "-m", "unipool_jax", "--version") == unipool("--version")
    where = unipool.run("python", "-c", "import unipool_jax; print(unipool_jax.__file__, unipool_jax.__version__)")
    assert where.split() == [str(unipool.packages / "unipool_jax" / "__init__.py"), VERSION]
    assert "Choices of scale" in unipool("train", "--help")


def test_a_run_says_which_code_made_it(unipool: Installed) -> None:
    run = unipool.folder / "runs" / "tiny"
    summary = json.loads((run / "summary.json").read_text())
    commit = (unipool.packages / "unipool_jax" / "COMMIT").read_text().strip()
    assert len(commit) == 40
    assert (summary["version"], summary["git_commit"]) == (VERSION, commit)
    assert f"(commit {commit})" in unipool("--version")
    meta = json.loads((run / "checkpoints" / "4" / "meta" / "metadata").read_text())
    assert (meta["versions"]["unipool_jax"], meta["git_commit"]) == (VERSION, commit)


def test_evaluate_and_generate(unipool: Installed) -> None:
    results = json.loads(unipool("eval", "runs/tiny", "splits=[valid]").splitlines()[-1])["results"]
    summary = json.loads((unipool.folder / "runs" / "tiny" / "summary.json").read_text())
    assert results["valid"]["tokens"] >= summary["results"]["valid"]["tokens"]
    assert unipool("generate", "runs/tiny", "pool", "max_tokens=2").startswith("pool")


def test_analyse_and_compare(unipool: Installed) -> None:
    assert "report: runs/tiny/analysis/4/report.html" in unipool("analyse", "runs/tiny", "draws=0")
    shutil.copytree(unipool.folder / "runs" / "tiny", unipool.folder / "runs" / "again")
    config = unipool.folder / "runs" / "again" / "config.yaml"
    config.write_text(config.read_text().replace("seed: 1234", "seed: 1"))
    assert "report: out/report.html" in unipool("compare", "runs/tiny", "runs/again", "out=out")


def test_convert_and_data(unipool: Installed) -> None:
    assert "4 experts" in unipool("convert", "export", "runs/tiny", "out=tiny.safetensors")
    assert "4 experts" in unipool("convert", "import", "tiny.safetensors", "run=runs/imported")
    words = ["split=[8,1,1]", "workers=1", "progress=false"]
    assert "40 documents" in unipool("data", "text.jsonl", "out=store", "tokenizer=bytes", *words)
    assert "40 documents" in unipool("data", "verify=store")


def test_plan_and_describe(unipool: Installed) -> None:
    assert "777,898,764" in unipool("describe", "scale=182m", "method=unipool")
    assert "8 devices" in unipool("plan", "scale=182m", "mesh=gpu_8")


def test_the_face(unipool: Installed) -> None:
    script = (
        "import unipool_jax\n"
        "print(unipool_jax.evaluate('runs/tiny', 'splits=[test]')['test'].tokens)\n"
        "print(unipool_jax.generate('runs/tiny', ['pool', 'layer'], 'max_tokens=2'))\n"
        "print(unipool_jax.compose('scale=182m', 'mode=describe').total_experts)\n"
    )
    tokens, texts, experts = unipool.run("python", "-c", script).splitlines()[-3:]
    assert int(tokens) > 0
    assert texts.startswith("[")
    assert experts == "96"
