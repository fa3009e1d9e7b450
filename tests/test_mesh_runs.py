"""Complete runs over a mesh: checkpoints that move between meshes, overflow, measured placement."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from runner import final_state, overrides
from unipool_jax.config.compose import compose_config
from unipool_jax.config.mesh_rules import AXES
from unipool_jax.config.schema import Config, ConfigError
from unipool_jax.training import loop, receive_buffers
from unipool_jax.training.initial import check_mesh, mesh_document
from unipool_jax.training.run_folder import RunError, RunFolder, run_name

STEPS = 8
SINGLE = ["mesh=single"]
EIGHT = ["mesh.data=2", "mesh.fsdp=2", "mesh.expert=2"]
EXPERTS_4 = ["mesh.data=2", "mesh.expert=4"]


pytestmark = pytest.mark.usefixtures("steps_are_shared")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


def run_of(shared: Path, runs: Path, *more: str) -> Config:
    """A tiny run of 8 steps in `runs`."""
    sizes = ["model.compute_dtype=float32", "train.batch_size=8", "train.microbatch_size=8", "train.eval_batch_size=8"]
    rhythm = ["train.checkpoint_every=4", "train.eval_every=4", "train.log_every=1", "moe.experts_per_layer=4"]
    return compose_config(overrides(shared, f"train.steps={STEPS}", f"run.dir={runs}", *sizes, *rhythm, *more))


@pytest.fixture
def configure(shared: Path, tmp_path: Path) -> Callable[..., Config]:
    """A run in its own folder, with further settings."""
    return lambda *more: run_of(shared, tmp_path, *more)


@pytest.fixture(scope="module")
def single_device(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The run on one device that nothing interrupted."""
    config = run_of(shared, tmp_path_factory.mktemp("single_device"), *SINGLE)
    assert loop.train(config) == 0
    return config


def folder_of(config: Config) -> Path:
    return Path(config.run.dir) / run_name(config)


def lines(config: Config, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder_of(config) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def assert_close(ours: Config, single: Config) -> None:
    """Same losses at every step, same evaluations, same state, to float32 tolerance."""
    for kind, name in (("train", "loss/lm"), ("train", "grad_norm"), ("valid", "loss")):
        mine, theirs = ([line[name] for line in lines(config, kind)] for config in (ours, single))
        np.testing.assert_allclose(mine, theirs, rtol=1e-4)
    states = [final_state(single, folder_of(config)) for config in (ours, single)]
    for name, value in states[0].items():
        np.testing.assert_allclose(value, states[1][name], rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have runs stop, as after a signal, once this step is done."""

    def install(step: int) -> None:
        count = {"steps": 0}

        def agree(self: Any) -> None:
            count["steps"] += 1
            if count["steps"] == step:
                self._received = 15

        monkeypatch.setattr(loop.StopRequest, "agree", agree)

    return install


@pytest.mark.parametrize(
    ("first", "second"),
    [(EIGHT, SINGLE), pytest.param(SINGLE, EXPERTS_4, marks=pytest.mark.slow)],
    ids=["8 to 1", "1 to 8"],
)
def test_a_run_goes_on_on_another_mesh(
    single_device: Config,
    configure: Callable[..., Config],
    stop_after: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    first: list[str],
    second: list[str],
) -> None:
    stop_after(5)
    assert loop.train(configure("run.name=moved", *first)) == 128 + 15
    moved = configure("run.name=moved", *second)
    capsys.readouterr()
    assert loop.train(moved) == 0
    said = capsys.readouterr().out
    assert "resuming after step 5" in said
    assert ("mesh data 2 x fsdp 1 x expert 4 x tensor 1, 1 process(es), all_gather transport" in said) == (
        second is EXPERTS_4
    )
    assert_close(moved, single_device)


def test_a_run_of_small_micro_batches_goes_on_over_devices_that_need_larger_ones(
    single_device: Config, configure: Callable[..., Config], stop_after: Callable[[int], None]
) -> None:
    stop_after(5)
    assert loop.train(configure("run.name=moved", "train.microbatch_size=4", *SINGLE)) == 128 + 15
    moved = configure("run.name=moved", "train.microbatch_size=8", *EIGHT)
    assert loop.train(moved) == 0
    assert_close(moved, single_device)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ([], None),
        (["method=vanilla"], None),
        (["loss.pool_statistics=previous"], "loss.pool_statistics=previous"),
        (["method=unipool_lock"], "lock.entropy_coefficient=0.005"),
        (["method=unipool_lock", "lock.entropy_coefficient=0"], None),
    ],
)
def test_micro_batches_may_change_where_losses_are_those_of_the_whole_batch(
    configure: Callable[..., Config], more: list[str], reason: str | None
) -> None:
    before, after = (configure(*more, f"train.microbatch_size={size}") for size in (4, 8))
    with RunFolder(before) as folder:
        (folder.checkpoints / "4").mkdir(parents=True)
    if reason is None:
        RunFolder(after).close()
        return
    with pytest.raises(RunError) as error:
        RunFolder(after)
    assert f"train.microbatch_size: 4 there, 8 now (losses depend on it with {reason})" in str(error.value)


def test_a_mesh_that_decides_which_rows_are_dropped_is_kept(configure: Callable[..., Config]) -> None:
    """Axes of -1 take the devices that are there: the settings are the same, the mesh is not."""
    config = configure("mesh.data=-1", "mesh.expert=2", "mesh.overflow=drop", "mesh.capacity_factor=1")
    four, eight = (jax.make_mesh((size // 2, 1, 2, 1), AXES, devices=jax.devices()[:size]) for size in (4, 8))
    meta = mesh_document(four)
    check_mesh(config, meta, four)
    check_mesh(config, {}, eight)  # a checkpoint of an earlier version
    check_mesh(configure("mesh.data=-1", "mesh.expert=2"), meta, eight)
    with pytest.raises(RunError, match=r"'data': 4.* was trained on .*'data': 2"):
        check_mesh(config, meta, eight)


@pytest.mark.slow
def test_measured_placement_changes_no_value(
    single_device: Config, configure: Callable[..., Config], stop_after: Callable[[int], None]
) -> None:
    stop_after(5)
    assert loop.train(configure("run.name=placed", *EXPERTS_4)) == 128 + 15
    placed = configure("run.name=placed", *EXPERTS_4, "mesh.expert_placement=measured")
    assert loop.train(placed) == 0
    assert_close(placed, single_device)
    mine, theirs = (np.load(folder_of(config) / "routing" / f"{STEPS}.npy") for config in (placed, single_device))
    np.testing.assert_array_equal(mine, theirs)
    assert all(len(line["load/device"]) == 2 for line in lines(placed, "train"))


def test_overflow_stops_the_run_and_says_what_to_do(
    single_device: Config, configure: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    tight = configure("run.name=tight", *EXPERTS_4, "mesh.capacity_factor=1")
    assert loop.train(tight) == loop.EXIT_NONFINITE
    said = capsys.readouterr().err
    assert "stopped at step 1" in said
    assert "its buffer holds 1 times" in said
    assert "mesh.expert_placement=measured" in said
    assert not lines(tight, "train")
    # The same run resumes with more capacity: the step that overflowed was not applied.
    assert loop.train(configure("run.name=tight", *EXPERTS_4)) == 0
    assert_close(configure("run.name=tight"), single_device)


def test_buffers_are_measured_and_an_overflow_is_overcome_by_the_same_command(
    single_device: Config,
    configure: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(receive_buffers, "UNMEASURED_FACTOR", 1.0)
    measured = configure("run.name=measured", *EXPERTS_4)
    assert loop.train(measured) == loop.EXIT_NONFINITE
    assert "The same command resumes from the last checkpoint with buffers of" in capsys.readouterr().err
    kept = json.loads((folder_of(measured) / receive_buffers.FILE).read_text())["receive_factor"]
    assert loop.train(measured) == 0
    assert_close(measured, single_device)
    assert f"all_gather transport with capacity factor {kept:g}" in capsys.readouterr().out
    received = [line["load/received"] for line in lines(measured, "train")]
    devices = [line["load/device"] for line in lines(measured, "train")]
    assert np.all(np.array(received) >= np.array(devices) - 1e-6)
    assert 1 < np.max(received) <= kept


def test_dropped_rows_are_reported_whatever_the_steps_between_lines(
    configure: Callable[..., Config],
    stop_after: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dropped = []
    shared = loop.make_train_step

    def make(config: Config, mesh: Any) -> Callable[..., Any]:
        train_step = shared(config, mesh)

        def step(state: Any, batch: Any) -> Any:
            state, metrics = train_step(state, batch)
            dropped.append(int(metrics["overflow"]))
            return state, metrics

        return step

    monkeypatch.setattr(loop, "make_train_step", make)
    tight = [*EXPERTS_4, "mesh.capacity_factor=1", "mesh.overflow=drop", "train.log_every=4"]
    dropping = configure("run.name=dropping", *tight)
    stop_after(6)
    assert loop.train(dropping) == 128 + 15
    assert loop.train(dropping) == 0
    assert len(dropped) == STEPS
    assert min(dropped) > 0
    written = {line["step"]: line["overflow"] for line in lines(dropping, "train")}
    assert written == {4: sum(dropped[:4]), 8: sum(dropped[4:])}
    summary = json.loads((folder_of(dropping) / "summary.json").read_text())
    assert summary["overflow"] == sum(dropped)
    assert f"rows dropped (mesh.overflow=drop): {sum(dropped):,}" in capsys.readouterr().out


def test_what_does_not_divide_over_the_devices_there_are_is_refused(configure: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"train.microbatch_size=4: must be a multiple of mesh.data=8"):
        loop.train(configure("mesh.data=-1", "train.microbatch_size=4"))
