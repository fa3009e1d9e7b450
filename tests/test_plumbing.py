"""The lock files say what setup.cfg asks for, and the Makefile explains itself."""

from __future__ import annotations

import configparser
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def locked(name: str) -> list[Requirement]:
    """The pinned requirements of a lock file, each with its hashes checked to be there."""
    joined = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line and not line.lstrip().startswith("#")]
    assert all("--hash=sha256:" in line for line in lines)
    return [Requirement(line.partition("--hash")[0]) for line in lines]


def on(python: str) -> dict[str, str]:
    """The environment markers of a version of Python on Linux."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.4",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }


def pins(name: str, python: str) -> dict[str, str]:
    """Exact versions by distribution for Linux and a version of Python."""
    chosen = [r for r in locked(name) if r.marker is None or r.marker.evaluate(on(python))]
    return {r.name.lower(): str(r.specifier).removeprefix("==") for r in chosen}


def asked(section: str, key: str) -> list[Requirement]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return [Requirement(line) for line in parser[section][key].splitlines() if line]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_locks_satisfy_the_package_metadata(python: str) -> None:
    core, test = pins("requirements.lock", python), pins("requirements-test.lock", python)
    for requirement in asked("options", "install_requires"):
        assert requirement.specifier.contains(core[requirement.name.lower()]), requirement
    for requirement in [*asked("options.extras_require", "data"), *asked("options.extras_require", "test")]:
        if requirement.marker is None or requirement.marker.evaluate(on(python)):
            assert requirement.specifier.contains(test[requirement.name.lower()]), requirement
    assert core.items() <= test.items()
    assert "pytest" not in core


def test_the_newest_jax_of_each_python_is_locked() -> None:
    assert pins("requirements.lock", "3.11")["jax"] == "0.10.2"
    assert {pins("requirements.lock", python)["jax"] for python in PYTHONS[1:]} == {"0.12.0.1"}


def test_the_classifiers_are_the_tested_pythons() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = [line.rpartition(" ")[2] for line in parser["metadata"]["classifiers"].splitlines() if line]
    assert listed == list(PYTHONS)
    assert parser["options"]["python_requires"] == f">={PYTHONS[0]}"


def test_the_image_has_the_newest_jax() -> None:
    image = re.search(r"^FROM python:([0-9.]+)-slim$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert image
    assert pins("requirements.lock", image[1])["jax"] == pins("requirements.lock", PYTHONS[-1])["jax"]


def test_the_tests_and_jax_for_tpus_install_together() -> None:
    """From Python 3.12 on. The libtpu that JAX 0.10 asks for is older than the one the planner was written with."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    locked_versions = pins("requirements-test.lock", python)
    assert importlib.metadata.version("jax") == locked_versions["jax"]
    requirements = [Requirement(line) for line in importlib.metadata.requires("jax") or []]
    (libtpu,) = (r for r in requirements if r.name == "libtpu" and r.marker and r.marker.evaluate({"extra": "tpu"}))
    assert libtpu.specifier.contains(locked_versions["libtpu"]) is (sys.version_info >= (3, 12))


def test_every_make_target_is_explained() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony
    assert set(phony.group(1).split()) == set(re.findall(r"^([a-z-]+):.*  ## \S", text, re.MULTILINE))


def write_command(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/bash", *lines, "")), encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """CI's scripts beside a `make` that prints its targets, on a machine whose only Python is that of .venv."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    write_command(
        tmp_path / ".venv/bin/python", f'exec {sys.executable} -c "import sys; sys.version_info = (3, 11); $2"'
    )
    write_command(tmp_path / "bin/make", 'echo "make $*"')
    for command in ("bash", "dirname", "grep"):
        (tmp_path / "bin" / command).symlink_to(shutil.which(command) or "")
    return tmp_path


def run_ci(checkout: Path) -> list[str]:
    command = [str(checkout / "bin/bash"), str(checkout / ".ci/run")]
    environment = {"PATH": str(checkout / "bin")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_ci_runs_the_same_commands_as_a_person(checkout: Path) -> None:
    write_command(checkout / "bin/python3.14", "exit 127")
    write_command(checkout / "bin/python3.12", "echo $0")
    assert run_ci(checkout) == ["make test", "make test-newest"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_ci_finds_a_python_that_pyenv_has_not_selected(checkout: Path) -> None:
    write_command(checkout / "bin/pyenv", 'printf "%s\\n" 3.11.7 3.13.0 3.13.0-debug')
    write_command(checkout / "bin/python3.13", '[ "$PYENV_VERSION" = 3.13.0 ] && echo found')
    assert run_ci(checkout) == ["make test", "make test-newest"]


def test_ci_says_that_it_found_no_newer_python(checkout: Path) -> None:
    lines = run_ci(checkout)
    assert lines == ["make test", "No Python 3.12 or newer was found: the newest JAX is not tested here."]


def test_ci_tests_once_where_the_default_python_is_new(checkout: Path) -> None:
    write_command(checkout / "bin/python3.14", "echo $0")
    write_command(checkout / ".venv/bin/python", "exit 1")
    assert run_ci(checkout) == ["make test"]


def test_the_files_left_out_of_the_fast_half_exist() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    named = [name for line in re.findall(r"^(?:LONG|TORCH) := (.*)$", text, re.MULTILINE) for name in line.split()]
    assert named
    assert [name for name in named if not (ROOT / f"tests/test_{name}.py").exists()] == []
