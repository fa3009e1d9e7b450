"""The lock files say what setup.cfg asks for, and the Makefile explains itself."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def locked(name: str) -> list[Requirement]:
    """The pinned requirements of a lock file, each with its hashes checked to be there."""
    joined = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line and not line.lstrip().startswith("#")]
    assert all("--hash=sha256:" in line for line in lines)
    return [Requirement(line.partition("--hash")[0]) for line in lines]


def pins(name: str, python: str) -> dict[str, str]:
    """Exact versions by distribution for Linux and a version of Python."""
    environment = {"python_version": python, "python_full_version": f"{python}.4", "sys_platform": "linux"}
    chosen = [r for r in locked(name) if r.marker is None or Marker(str(r.marker)).evaluate(environment)]
    return {r.name.lower(): str(r.specifier).removeprefix("==") for r in chosen}


def asked(section: str, key: str) -> list[Requirement]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return [Requirement(line) for line in parser[section][key].splitlines() if line]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_locks_satisfy_the_package_metadata(python: str) -> None:
    core, test = pins("requirements.lock", python), pins("requirements-test.lock", python)
    for requirement in asked("options", "install_requires"):
        assert requirement.specifier.contains(core[requirement.name.lower()]), requirement
    for requirement in [*asked("options.extras_require", "data"), *asked("options.extras_require", "test")]:
        assert requirement.specifier.contains(test[requirement.name.lower()]), requirement
    assert core.items() <= test.items()
    assert "pytest" not in core


def test_the_newest_jax_of_each_python_is_locked() -> None:
    assert pins("requirements.lock", "3.11")["jax"] == "0.10.2"
    assert pins("requirements.lock", "3.12")["jax"].startswith("0.12.")


def test_every_make_target_is_explained() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony
    assert set(phony.group(1).split()) == set(re.findall(r"^([a-z-]+):.*  ## \S", text, re.MULTILINE))


def test_ci_runs_the_same_command_as_a_person() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands[0] == "set -euo pipefail"
    assert commands[-1] == "make test"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
