"""The search of the planner: what it tries, what it leaves out, and the command line it prints."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest

from planned import needs_compiler, small
from unipool_jax.config.chips import CHIPS, parse_topology
from unipool_jax.config.compose import compose_config
from unipool_jax.config.mesh_rules import AXES
from unipool_jax.config.rules import problems
from unipool_jax.config.schema import Config, ConfigError
from unipool_jax.planner import command, search
from unipool_jax.planner.roofline import estimate


def test_mesh_shapes_by_brute_force() -> None:
    wanted = {shape for shape in np.ndindex(13, 13, 13, 13) if 0 not in shape and math.prod(shape) == 12}
    assert set(search.mesh_shapes(12)) == wanted


@pytest.mark.usefixtures("gpus_are_counted")
def test_a_search_finds_the_fastest_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = compose_config(
        ["scale=182m", "mesh=gpu_8", "mode=plan", "plan.search=true", f"plan.figure={tmp_path}/deep/frontier.png"]
    )
    assert command.run(config) == 0
    text = capsys.readouterr().out
    found, _ = search.candidates(config)
    room = CHIPS["h100"].hbm_bytes
    fastest = min(c.estimate.seconds for c in found if c.gigabytes * 1e9 <= room)
    last = json.loads(text.splitlines()[-1])
    assert last["step_seconds"] == fastest
    assert (tmp_path / "deep" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    # The command it prints is one that composes and validates, and models to the same time.
    again = compose_config([*shlex.split(last["command"])[2:], "mode=plan"])
    assert problems(again) == []
    sizes = {axis: getattr(again.mesh, axis) for axis in AXES}
    assert estimate(again, sizes, parse_topology("h100:8"), None).seconds == fastest


def test_the_command_of_a_search_trains_what_was_searched_for() -> None:
    more = ["pool.experts=48", "moe.top_k=2", "mesh.capacity_factor=2", "train.eval_batches=null", "run.name='1e3'"]
    config = compose_config(["scale=182m", "mesh=gpu_8", "mode=plan", "plan.search=true", "plan.compiled=1", *more])
    chosen = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=2, expert=4))
    line = search.command(chosen)
    assert line.startswith("unipool train scale=182m method=unipool ")
    assert compose_config(shlex.split(line)[2:]) == dataclasses.replace(chosen, mode="train", plan=Config().plan)
    custom = dataclasses.replace(chosen, scale_name="mine")
    assert compose_config(shlex.split(search.command(custom))[2:]).scale_name == "mine"


@pytest.mark.usefixtures("gpus_are_counted")
def test_mesh_shapes_that_a_search_leaves_out_are_counted() -> None:
    """Six devices: evaluation takes the largest batch that divides; a batch of 16 leaves shapes with a three out."""
    more = ["mesh=gpu_8", "mesh.topology=h100:6", "scale=182m", "mode=plan", "model.num_layers=1"]
    found, left_out = search.candidates(compose_config([*more, "train.batch_size=48", "train.eval_batch_size=32"]))
    assert {(c.config.train.eval_batch_size, c.config.mesh.data) for c in found} >= {(30, 6), (30, 3)}
    found, left_out = search.candidates(compose_config([*more, "train.batch_size=16"]))
    shapes = {tuple(getattr(c.config.mesh, axis) for axis in AXES) for c in found}
    assert len(shapes) + sum(left_out.values()) == len(list(search.mesh_shapes(6)))
    assert left_out["train.batch_size=16 is no multiple of data x fsdp x expert"] == 12
    assert left_out["mesh.tensor is refused"] == 4


@pytest.mark.usefixtures("gpus_are_counted")
def test_the_frontier_has_what_nothing_beats() -> None:
    found, _ = search.candidates(compose_config(["scale=182m", "mesh=gpu_8", "mode=plan"]))
    front = search.frontier(found)
    for candidate in found:
        better = [
            f for f in front if f.estimate.seconds <= candidate.estimate.seconds and f.gigabytes <= candidate.gigabytes
        ]
        assert better


@needs_compiler
@pytest.mark.slow
def test_a_search_compiles_the_best(tmp_path: Path) -> None:
    config = small("unipool", "plan.search=true", "plan.compiled=1", f"plan.figure={tmp_path}/plan.png")
    text = search.search(config)
    assert "compiled (1 of the fastest):" in text
    assert json.loads(text.splitlines()[-1])["compiled"] is True


def test_a_search_without_the_tpu_compiler_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"mesh.topology=v5p:2x2x4: .*`pip install libtpu`"):
        search.search(small("unipool", "mesh.topology=v5p:2x2x4", "mesh.data=4", "plan.search=true"))


@pytest.mark.usefixtures("gpus_are_counted")
def test_a_search_without_room_says_so(tmp_path: Path) -> None:
    config = compose_config(
        ["scale=978m", "mesh=gpu_8", "mesh.topology=h100:1", "mesh.expert=1", "mode=plan", "plan.search=true",
         "pool.experts=768", "train.batch_size=512", f"plan.figure={tmp_path}/plan.png"]
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"mesh.topology=h100:1: none of 0 candidates is known to fit"):
        search.search(config)
