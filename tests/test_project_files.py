"""What people use to carry the project on agrees with the project: workflows, hooks, citation, navigation."""

from __future__ import annotations

import configparser
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in WORKFLOWS:
        yield from ((f"{path.name}: {name}", job) for name, job in read_yaml(path)["jobs"].items())


def test_jobs_run_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*  ## \S", makefile, re.MULTILINE))
    commands = [step.get("run", "") for _, job in jobs() for step in job["steps"]]
    used = {target for command in commands for target in re.findall(r"\bmake ([a-z-]+)", command)}
    assert {"lint", "typecheck", "test", "test-slow", "docs"} <= used <= targets


@pytest.mark.parametrize(("name", "job"), list(jobs()), ids=[name for name, _ in jobs()])
def test_jobs_are_pinned_and_end(name: str, job: dict[str, Any]) -> None:
    assert re.fullmatch(r"ubuntu-\d+\.\d+", job["runs-on"]), name
    assert 0 < job["timeout-minutes"] <= 360
    actions = [step["uses"] for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+\.\d+\.\d+", action) for action in actions), actions


def test_the_matrix_has_the_supported_pythons() -> None:
    words = setup_cfg()["metadata"]["classifiers"].splitlines()
    supported = [found[1] for word in words if (found := re.fullmatch(r".*:: (3\.\d+)", word))]
    assert read_yaml(ROOT / ".github/workflows/ci.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"] == supported


def test_hooks_have_the_versions_of_the_test_environment() -> None:
    pinned = dict(re.findall(r"^(ruff|mypy) ==(\S+)$", setup_cfg()["options.extras_require"]["test"], re.MULTILINE))
    ruff, local = read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    assert (ruff["rev"], local["hooks"][0]["name"]) == (f"v{pinned['ruff']}", f"mypy {pinned['mypy']}")
    docs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]["docs"]
    assert f"ruff =={pinned['ruff']}" in docs


def test_citation_and_package_agree() -> None:
    citation, metadata = read_yaml(ROOT / "CITATION.cff"), setup_cfg()["metadata"]
    ours = (citation["title"], citation["abstract"], citation["license"])
    assert ours == (metadata["name"], metadata["description"], metadata["license"])
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2605.06665"


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda p: p.stem)
def test_issue_forms_ask_for_something(path: Path) -> None:
    form = read_yaml(path)
    assert form["name"]
    assert form["description"]
    fields = [item for item in form["body"] if item["type"] in ("input", "textarea")]
    assert len({item["id"] for item in fields}) == len(fields) == len(form["body"])
    assert any(item.get("validations", {}).get("required") for item in fields)


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(inner)

    listed = list(pages(read_yaml(ROOT / "mkdocs.yml")["nav"]))
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").glob("**/*.md")}
    packages = {f"api/{path.parent.name}.md" for path in (ROOT / "unipool_jax").glob("*/__init__.py")}
    assert sorted(listed) == sorted({*written, *packages, "api/index.md"})
