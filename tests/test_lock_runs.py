"""Small runs with UniPool-lock: resume at any step, signals, fail-stop, evaluation and generation from checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from runner import assert_same, final_state, overrides
from shared_steps import share_steps
from unipool_jax.cli.guard import guarded
from unipool_jax.cli.main import execute
from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import Config
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.runs import read_run
from unipool_jax.evaluation.generate import generate_texts
from unipool_jax.evaluation.requests import GenerateRequest
from unipool_jax.moe.lock_lifecycle import LockError
from unipool_jax.training import evaluate, loop
from unipool_jax.training.checkpoint import Checkpoints
from unipool_jax.training.entry import run
from unipool_jax.training.metrics import CLOCKED
from unipool_jax.training.run_folder import run_name

STEPS, FREEZE, LOCK = 12, 4, 8
_LOCK = (
    "train.steps=12 train.eval_every=2 train.checkpoint_every=2 train.keep_checkpoints=20 train.log_every=1 "
    "lock.lock_step=8 lock.anneal_steps=4 lock.entropy_warmup_steps=3 lock.entropy_target=2"
)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> Iterator[list[tuple[str, Any]]]:
    """Every step of this file is compiled once; the list holds all that were asked for."""
    with pytest.MonkeyPatch.context() as patch:
        yield share_steps(patch)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def configure(shared: Path, tmp_path: Path) -> Callable[..., Config]:
    return functools.partial(_configure, shared, tmp_path)


def _configure(shared: Path, folder: Path, *more: str) -> Config:
    base = [word for word in overrides(shared) if not word.startswith("method=")]
    return compose_config(["method=unipool_lock", *base, *_LOCK.split(), f"run.dir={folder}", *more])


@pytest.fixture(scope="module")
def uninterrupted(shared: Path, tmp_path_factory: pytest.TempPathFactory, compiled: list[tuple[str, Any]]) -> Config:
    """A run that nothing interrupted."""
    config = _configure(shared, tmp_path_factory.mktemp("uninterrupted"))
    assert loop.train(config) == 0
    assert [(name, step._cache_size()) for name, step in compiled] == [
        ("eval", 1), ("train", 1), ("eval", 1), ("train", 1)
    ]  # fmt: skip
    return config


def folder_of(config: Config) -> Path:
    return Path(config.run.dir) / run_name(config)


def lines(config: Config, kind: str | None = None) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    found = [json.loads(line) for line in (folder_of(config) / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in CLOCKED}
        for line in found
        if kind in (None, line["kind"])
    ]


def meta_of(config: Config, step: int) -> dict[str, Any]:
    with Checkpoints(folder_of(config) / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.meta(step)


def test_a_run_goes_through_all_phases(uninterrupted: Config) -> None:
    valid = {line["step"]: line for line in lines(uninterrupted, "valid")}
    stages = {step: (line["lock/stage"], line["lock/installed_stage"]) for step, line in valid.items()}
    assert stages == {2: (0, 0), 4: (0, 1), 6: (1, 1), 8: (1, 2), 10: (2, 2), 12: (2, 2)}
    assert [valid[step]["lock/fade"] for step in (2, 4, 10)] == [0, 0, 0]
    assert valid[6]["lock/fade"] == pytest.approx(0.5 * (1 - np.cos(np.pi / 4)))
    assert all(valid[step]["lock/off_mask_routes"] == 0 for step in valid)
    train = lines(uninterrupted, "train")
    assert train[0]["loss/entropy"] == 0 < train[1]["loss/entropy"]
    for line in train:
        terms = [line[f"loss/{name}"] for name in ("lm", "balance", "z", "entropy")]
        assert line["loss/total"] == pytest.approx(sum(terms), rel=1e-6)

    owner = np.array(meta_of(uninterrupted, STEPS)["lock"]["lock"]["owner"])
    assert meta_of(uninterrupted, 6)["lock"]["candidate"]["owner"] == owner.tolist()
    for step in range(2, STEPS + 1, 2):
        counts = np.load(folder_of(uninterrupted) / "routing" / f"{step}.npy")
        assert counts.shape == (2, 4)
        outside = np.where(owner == np.arange(2)[:, None], 0, counts)
        assert step <= LOCK or not outside.any()
    for name in ("freeze-4", "lock-8"):
        assert (folder_of(uninterrupted) / "lock" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder_of(uninterrupted) / "summary.json").read_text())["experts_total"] == 4


def test_checkpoints_have_the_structure_of_their_step(uninterrupted: Config) -> None:
    for step in (6, LOCK, STEPS):
        config = uninterrupted.after_lock() if step >= LOCK else uninterrupted
        shapes = {name: array.shape for name, array in final_state(config, folder_of(uninterrupted), step).items()}
        bank = (2, 2, 16, 16) if step >= LOCK else (1, 4, 16, 16)
        assert shapes["['params']['pools']['bank']['gate']"] == bank
        moments = [shape for name, shape in shapes.items() if "mu" in name and "'gate'" in name]
        assert moments == [bank]
        assert any("owner_M" in name for name in shapes) == (step < LOCK)


@pytest.mark.parametrize(
    "at",
    [
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(FREEZE, marks=pytest.mark.slow),
        6,
        LOCK,
        pytest.param(10, marks=pytest.mark.slow),
    ],
)
def test_a_run_resumed_anywhere_ends_at_the_same_bits(uninterrupted: Config, tmp_path: Path, at: int) -> None:
    config = dataclasses.replace(uninterrupted, run=dataclasses.replace(uninterrupted.run, dir=str(tmp_path)))
    shutil.copytree(folder_of(uninterrupted), folder_of(config))
    (folder_of(config) / "summary.json").unlink()
    for path in (folder_of(config) / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > at:
            shutil.rmtree(path)
    assert loop.train(config) == 0
    after = uninterrupted.after_lock()
    assert_same(final_state(after, folder_of(uninterrupted)), final_state(after, folder_of(config)))
    assert lines(config) == lines(uninterrupted)
    assert meta_of(config, STEPS)["lock"] == meta_of(uninterrupted, STEPS)["lock"]


@pytest.mark.parametrize(
    "at", [pytest.param(FREEZE, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow), LOCK]
)
def test_a_signal_at_a_boundary_loses_nothing(
    uninterrupted: Config, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    config, make = configure(), loop.make_train_step

    def killing(config: Config, mesh: Any = None) -> Any:
        train_step = make(config, mesh)

        def step(state: Any, batch: Any) -> Any:
            state, metrics = train_step(state, batch)
            if int(jax.device_get(state.step)) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return state, metrics

        return step

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_train_step", killing)
        assert loop.train(config) == 128 + signal.SIGTERM
    assert loop.train(config) == 0
    after = uninterrupted.after_lock()
    assert_same(final_state(after, folder_of(uninterrupted)), final_state(after, folder_of(config)))
    assert lines(config, "valid") == lines(uninterrupted, "valid")


class _Killed(BaseException):
    """Ends a run as `kill -9` does: after it nothing is saved."""


@pytest.mark.parametrize("at", [2, FREEZE])
def test_an_evaluation_that_no_checkpoint_has_seen_is_seen_again(
    uninterrupted: Config, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """A signal puts off the evaluation after a step, and the resumed run is killed between it and the next save."""
    config, make = configure(), loop.make_train_step

    def after(step: int, happens: Callable[[], None]) -> Callable[..., Any]:
        def making(config: Config, mesh: Any = None) -> Any:
            train_step = make(config, mesh)

            def train(state: Any, batch: Any) -> Any:
                state, metrics = train_step(state, batch)
                if int(jax.device_get(state.step)) == step:
                    happens()
                return state, metrics

            return train

        return making

    def kill() -> None:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_train_step", after(at, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert loop.train(config) == 128 + signal.SIGTERM
        assert meta_of(config, at)["lock"]["observed"] < at
        patch.setattr(loop, "make_train_step", after(at + 1, kill))
        with pytest.raises(_Killed):
            loop.train(config)
    assert [line["step"] for line in lines(config, "valid")][-1] == at
    assert loop.train(config) == 0
    after_lock = uninterrupted.after_lock()
    assert_same(final_state(after_lock, folder_of(uninterrupted)), final_state(after_lock, folder_of(config)))
    assert lines(config, "valid") == lines(uninterrupted, "valid")
    assert meta_of(config, STEPS)["lock"] == meta_of(uninterrupted, STEPS)["lock"]
    assert meta_of(config, 6)["lock"]["history"] == meta_of(uninterrupted, 6)["lock"]["history"]


def test_losses_too_high_stop_the_run_with_a_code_of_their_own(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, original = configure(), evaluate.Evaluator.evaluate
    losses = iter([3.5, 3.0, 3.06, 3.07])

    def scripted(self: Any, *arguments: Any) -> Any:
        found = original(self, *arguments)
        return None if found is None else found._replace(loss=next(losses))

    monkeypatch.setattr(evaluate.Evaluator, "evaluate", scripted)
    assert loop.train(config) == loop.EXIT_LOSS_EXCESS == 4
    error = capsys.readouterr().err
    assert "step 8" in error
    assert "lock.max_loss_excess=0.05" in error
    assert "3.0000" in error
    (last,) = (line for line in lines(config, "valid") if line["step"] == LOCK)
    assert (last["lock/excess_in_a_row"], last["lock/installed_stage"]) == (2, 1)
    with Checkpoints(folder_of(config) / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4, 6]


def test_a_checkpoint_without_its_evaluation_is_refused(uninterrupted: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(uninterrupted, run=dataclasses.replace(uninterrupted.run, dir=str(tmp_path)))
    shutil.copytree(folder_of(uninterrupted), folder_of(config))
    with Checkpoints(folder_of(config) / "checkpoints", read_only=True) as checkpoints:
        document = checkpoints.meta(FREEZE)
    state = jax.tree.map(np.asarray, loop.initial_state(config, checkpoints_until(config, FREEZE), corpus_of(config)))
    lock = loop.open_lock(config, folder_of(config), document, FREEZE)
    assert lock is not None
    with pytest.raises(LockError, match="differs from the one in its lock record"):
        lock.start(state._replace(balance=state.balance._replace(lock=state.balance.lock._replace(
            owner_M=np.full(4, -1)))))  # fmt: skip
    without = {**document, "lock": None}
    with pytest.raises(LockError, match="has no lock state"):
        loop.open_lock(config, folder_of(config), without, FREEZE)


def checkpoints_until(config: Config, step: int) -> Checkpoints:
    folder = folder_of(config) / "checkpoints"
    for path in folder.iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    return Checkpoints(folder, read_only=True)


def corpus_of(config: Config) -> Any:
    return loop.open_corpus(config.data, config.model.vocab_size)


@pytest.mark.parametrize("step", [pytest.param(6, marks=pytest.mark.slow), STEPS])
def test_saved_models_evaluate_generate_and_are_not_converted(
    uninterrupted: Config, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    """In the middle of the fade, and after the lock."""
    (line,) = (line for line in lines(uninterrupted, "valid") if line["step"] == step)
    assert execute(["eval", f"run={folder_of(uninterrupted)}", f"step={step}", "splits=[valid]"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["valid"]
    if result["tokens"] == line["tokens"]:
        assert result["loss"] == pytest.approx(line["loss"], rel=1e-6)
    (text,) = generate_texts(GenerateRequest(str(folder_of(uninterrupted)), ("pool",), step=step, max_tokens=3))
    assert isinstance(text, str)
    with pytest.raises(ConversionError, match="UniPool-lock"):
        read_run(str(folder_of(uninterrupted)), step)
    assert read_run(str(folder_of(uninterrupted)), 2)[0] == uninterrupted


@pytest.mark.parametrize("ownership", ["random_from_start", pytest.param("random_at_lock", marks=pytest.mark.slow)])
def test_the_controls_run(configure: Callable[..., Config], ownership: str) -> None:
    config = configure(f"lock.ownership={ownership}")
    assert loop.train(config) == 0
    owner = np.array(meta_of(config, STEPS)["lock"]["lock"]["owner"])
    for step in range(2, STEPS + 1, 2):
        counts = np.load(folder_of(config) / "routing" / f"{step}.npy")
        private = not np.where(owner == np.arange(2)[:, None], 0, counts).any()
        assert private or (step <= LOCK and ownership == "random_at_lock")
    if ownership == "random_from_start":
        # The same initial weights as the shared pool's, and the same way on after a resume.
        first = lines(config, "valid")
        assert all(line["lock/stage"] == 2 for line in first)
        (folder_of(config) / "summary.json").unlink()
        checkpoints_until(config, 6)
        assert loop.train(config) == 0
        assert lines(config, "valid") == first


def test_a_run_can_go_on_and_lock_on_a_mesh(uninterrupted: Config, tmp_path: Path) -> None:
    """From one device in the middle of the fade, over the lock on four, and back to one."""
    config = dataclasses.replace(uninterrupted, run=dataclasses.replace(uninterrupted.run, dir=str(tmp_path)))
    shutil.copytree(folder_of(uninterrupted), folder_of(config))
    (folder_of(config) / "summary.json").unlink()
    checkpoints_until(config, 6)
    spread = dataclasses.replace(config.mesh, data=2, expert=2)
    assert loop.train(dataclasses.replace(config, mesh=spread)) == 0
    for here, there in zip(lines(config, "valid"), lines(uninterrupted, "valid"), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-4)
    assert meta_of(config, STEPS)["lock"]["lock"]["owner"] == meta_of(uninterrupted, STEPS)["lock"]["lock"]["owner"]

    after, alone = uninterrupted.after_lock(), final_state(uninterrupted.after_lock(), folder_of(uninterrupted))
    for name, array in final_state(after, folder_of(config)).items():
        np.testing.assert_allclose(array, alone[name], rtol=0.02, atol=2e-4, err_msg=name)
    (folder_of(config) / "summary.json").unlink()
    checkpoints_until(config, LOCK)
    assert loop.train(config) == 0
    assert lines(config, "valid")[-1]["loss"] == pytest.approx(lines(uninterrupted, "valid")[-1]["loss"], rel=1e-4)


def test_lock_settings_may_not_change_within_a_run(uninterrupted: Config, capsys: pytest.CaptureFixture[str]) -> None:
    changed = dataclasses.replace(uninterrupted, lock=dataclasses.replace(uninterrupted.lock, coverage_threshold=0.5))
    assert guarded(lambda: run(changed)) == 1
    assert "lock.coverage_threshold: 0.95 there, 0.5 now" in capsys.readouterr().err
