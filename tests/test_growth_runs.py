"""Runs that grow: metrics, checkpoints that know their stage, resumption, evaluation and conversion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from runner import assert_same, final_state, overrides
from unipool_jax.analysis.history import layers_of
from unipool_jax.cli.main import execute
from unipool_jax.config.compose import load_config
from unipool_jax.config.files import FileError
from unipool_jax.config.growth_schedule import depths, with_layers
from unipool_jax.config.schema import ConfigError
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.runs import read_run
from unipool_jax.moe.lock_lifecycle import structure
from unipool_jax.training.checkpoint import Checkpoints
from unipool_jax.training.flops import flops_spent
from unipool_jax.training.metrics import CLOCKED
from unipool_jax.training.run_folder import RunError

pytestmark = pytest.mark.usefixtures("steps_are_shared")

WORDS = (
    *("train.batch_size=8", "train.microbatch_size=8"),
    *("train.steps=8", "train.checkpoint_every=2", "train.eval_every=4", "train.eval_batches=null"),
    *(
        "train.log_every=1",
        "train.keep_checkpoints=20",
        "growth.layers=[1,2]",
        "growth.ends=[.5,1]",
        "growth.depth_law=uniform",
    ),
)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one layer for four steps, then of two."""
    place = tmp_path_factory.mktemp("grown")
    assert execute(["train", *overrides(place, *WORDS)]) == 0
    return place / "runs" / "tiny"


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCKED} for line in found]


def cut(run: Path, place: Path, step: int) -> Path:
    """A copy of a run as it is found when it was killed after its checkpoint of `step`."""
    found = place / "runs" / "tiny"
    shutil.copytree(run, found)
    (found / "summary.json").unlink()
    for folder in (found / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    return found


def test_metrics_say_what_was_spent_and_at_which_depth(grown: Path) -> None:
    config = load_config(grown / "config.yaml")
    drawn = depths(config, 0, 8)[:, 0].tolist()
    assert set(drawn[:4]) == {1, 2}
    assert drawn[4:] == [2] * 4
    training = [line for line in lines(grown) if line["kind"] == "train"]
    assert [line["growth/depth"] for line in training] == drawn
    assert [line["growth/layers"] for line in training] == [1] * 4 + [2] * 4
    assert [line["flops"] for line in training] == [flops_spent(config, step) for step in range(1, 9)]
    assert json.loads((grown / "summary.json").read_text())["flops"] == flops_spent(config, 8)
    # Shares of tokens stay shares where a layer is used twice.
    assert all(0 <= share <= 1 for line in training for share in line["routing/zero_gates"])
    first, last = [line for line in lines(grown) if line["kind"] == "valid"]
    assert (len(first["load/layer"]), len(last["load/layer"])) == (1, 2)
    assert first["loss/full_depth"] != first["loss"]
    assert "loss/full_depth" not in last


@pytest.mark.parametrize("step", [2, 4, pytest.param(6, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_for_bit(grown: Path, tmp_path: Path, step: int) -> None:
    """In a stage, at the step of the growth and after it: arrays, depths and every line of metrics."""
    run = cut(grown, tmp_path, step)
    assert execute(["train", str(run)]) == 0
    config = with_layers(load_config(run / "config.yaml"), 2)
    assert_same(final_state(config, grown), final_state(config, run))
    assert lines(run) == lines(grown)


@pytest.mark.slow
def test_a_run_that_grows_goes_on_on_another_mesh(grown: Path, tmp_path: Path) -> None:
    """From one device to eight in the first stage: depths, growth and losses are the same."""
    run = cut(grown, tmp_path, 2)
    words = ("mesh.data=2", "mesh.fsdp=2", "mesh.expert=2", "mesh.capacity_factor=2")
    assert execute(["train", str(run), *words]) == 0
    for found, wanted in zip(lines(run), lines(grown), strict=True):
        for name in ("loss", "loss/lm", "loss/full_depth", "flops", "growth/depth", "growth/layers"):
            assert found.get(name) == (None if name not in wanted else pytest.approx(wanted[name], rel=1e-3))


@pytest.mark.slow
def test_a_lock_begins_when_all_layers_are_there(tmp_path: Path) -> None:
    """Freeze and lock after the last growth; a run that is killed before, at and after it comes to the same."""
    words = ("method=unipool_lock", "train.steps=24", "train.eval_every=4", "train.checkpoint_every=4")
    lock = ("lock.lock_step=16", "lock.anneal_steps=4", "lock.count_lookback=1", "lock.entropy_warmup_steps=4")
    growth = ("growth.layers=[1,2]", "growth.ends=[.25,1]", "lock.entropy_target=2", "train.keep_checkpoints=20")
    assert execute(["train", *overrides(tmp_path, *words, *lock, *growth)]) == 0
    run = tmp_path / "runs" / "tiny"
    valid = [line for line in lines(run) if line["kind"] == "valid"]
    assert [line["step"] for line in valid if "lock/stage" in line] == [8, 12, 16, 20, 24]
    assert [line.get("loss/entropy") is not None for line in lines(run) if line["kind"] == "train"][-1]
    config, folder = load_config(run / "config.yaml"), run / "checkpoints"
    with Checkpoints(folder, read_only=True) as checkpoints:
        kinds = [structure(config, checkpoints.meta(step)) for step in (4, 8, 16, 20)]
    assert [(kind.model.num_layers, kind.pool.groups) for kind in kinds] == [(1, 1), (2, 1), (2, 2), (2, 2)]
    for step in (4, 8, 16):
        again = cut(run, tmp_path / str(step), step)
        assert execute(["train", str(again)]) == 0
        assert_same(final_state(kinds[-1], run), final_state(kinds[-1], again))


def test_histories_hold_nothing_of_layers_that_were_not_there() -> None:
    history = [
        {"kind": "train", "step": 1, "growth/layers": 1, "share": [0.5]},
        {"kind": "train", "step": 2, "growth/layers": 2, "share": [0.25, 0.75]},
    ]
    np.testing.assert_array_equal(layers_of(history, "train", "share", 2).y, [[0.5, 0.25], [np.nan, 0.75]])
    history[0]["share"] = [0.5, 0.5]
    with pytest.raises(FileError, match="expected 1 numbers"):
        layers_of(history, "train", "share", 2)


def test_checkpoints_know_their_stage(grown: Path) -> None:
    with Checkpoints(grown / "checkpoints", read_only=True) as checkpoints:
        assert [checkpoints.meta(step)["growth"] for step in (2, 4, 6, 8)] == [{"layers": n} for n in (1, 1, 2, 2)]
    config, weights = read_run(str(grown), 4)
    assert (config.model.num_layers, config.total_experts, config.growth.layers) == (1, 4, ())
    assert weights.params["pools"]["bank"]["up"].shape[:2] == (1, 4)
    # The first step of the second stage starts with two copies of the layer; they differ after it.
    router = read_run(str(grown), 6)[1].params["pools"]["layers"]["mixture"]["router"]
    assert router.shape[1] == 2
    assert (router[:, 0] != router[:, 1]).any()


def test_a_checkpoint_is_evaluated_at_the_depth_of_its_stage(grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["eval", str(grown), "step=4", "splits=[valid]"]) == 0
    (line,) = [line for line in lines(grown) if line["kind"] == "valid" and line["step"] == 4]
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["results"]["valid"]["loss"] == pytest.approx(line["loss"])


def test_stages_are_fixed_when_a_run_begins(grown: Path) -> None:
    with pytest.raises(RunError, match=r"growth\.ends: \(0\.5, 1\.0\) there, \(0\.75, 1\.0\) now"):
        execute(["train", str(grown), "growth.ends=[.75,1]"])


def test_a_finished_run_is_deepened(grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`convert grow`: layers are copies by the map, the shared pool stays, and so does what a refusal protects."""
    deep = tmp_path / "deep"
    command = ["convert", "grow", str(grown), f"out={deep}"]
    assert execute([*command, "model.num_layers=5", "map=stack"]) == 0
    assert (
        "of 5 layers from 2, 4 experts, at step 0; its layers are the layers [0, 1, 0, 1, 1]" in capsys.readouterr().out
    )
    config, weights = read_run(str(deep))
    assert (config.model.num_layers, config.total_experts, config.growth.layers) == (5, 4, ())
    source = read_run(str(grown))[1]
    for name in ("bank", "layers"):
        for old, new in zip(
            jax.tree.leaves(source.params["pools"][name]), jax.tree.leaves(weights.params["pools"][name]), strict=True
        ):
            np.testing.assert_array_equal(new, old if name == "bank" else old[:, [0, 1, 0, 1, 1]])
    with pytest.raises(ConfigError, match=r"model\.num_layers=2: the run has 2 layers; set more, such as 4"):
        execute([*command, "model.num_layers=2"])
    with pytest.raises(ConversionError, match=r"model\.hidden_size=32: it is 16"):
        execute([*command, "model.num_layers=4", "model.hidden_size=32"])
