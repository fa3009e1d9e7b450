"""Finished runs that go on: extended, or as the start of another run."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from runner import assert_same, final_state, overrides
from tiny import tiny_config
from unipool_jax.cli.main import execute
from unipool_jax.config.compose import compose_config, load_config
from unipool_jax.config.lock_schedule import make_schedule as lock_schedule
from unipool_jax.config.rules import problems
from unipool_jax.config.schema import Config, ConfigError, OptimizerConfig
from unipool_jax.convert.runs import read_run, write_run
from unipool_jax.data.tokenizer import load_tokenizer
from unipool_jax.moe.lock_lifecycle import from_document, new_record, to_document
from unipool_jax.training import loop
from unipool_jax.training.extension import with_more_steps
from unipool_jax.training.lineage import read_lineage
from unipool_jax.training.optimizer import extension_notice
from unipool_jax.training.run_folder import RunError
from unipool_jax.training.state import state_shapes
from unipool_jax.training.warm_start import architecture_differences, warm_state

pytestmark = pytest.mark.usefixtures("steps_are_shared")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of eight steps."""
    place = tmp_path_factory.mktemp("short")
    words = ["train.steps=8", "train.checkpoint_every=4", "train.log_every=1", "train.keep_checkpoints=20"]
    assert execute(["train", *overrides(place, *words)]) == 0
    return place / "runs" / "tiny"


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder / "run")
    return folder / "run"


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send SIGTERM after this step, once."""
    shared = loop.make_train_step

    def make(config: Config, mesh: Any) -> Any:
        train_step = shared(config, mesh)

        def run(state: Any, batch: Any) -> Any:
            state, metrics = train_step(state, batch)
            if int(jax.device_get(state.step)) == step:
                monkeypatch.setattr(loop, "make_train_step", shared)
                signal.raise_signal(signal.SIGTERM)
            return state, metrics

        return run

    monkeypatch.setattr(loop, "make_train_step", make)


def test_an_extended_run_keeps_its_past_and_resumes_bit_exactly(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    through, stopped = copied(short, tmp_path / "a"), copied(short, tmp_path / "b")
    past = lines(short)
    command = ["train.steps=+8", "optimizer.extension=rewarm"]
    assert execute(["train", str(through), *command]) == 0
    assert "extended from step 8 to 16 (optimizer.extension=rewarm): the learning rate rises" in capsys.readouterr().out

    stop_at(monkeypatch, 11)
    assert execute(["train", f"run={stopped}", *command]) == 128 + signal.SIGTERM
    assert not (stopped / "summary.json").exists()
    assert execute(["train", f"run={stopped}", *command]) == 0  # the same command goes on, and adds no more
    config = load_config(stopped / "config.yaml")
    assert config.train.lengths == load_config(through / "config.yaml").train.lengths == (8, 16)
    assert_same(final_state(config, through), final_state(config, stopped))

    for run in (through, stopped):
        assert [line["step"] for line in lines(run)] == list(range(1, 17))
        assert lines(run)[:8] == past
        assert json.loads((run / "summary.json").read_text())["step"] == 16
        assert json.loads((run / "summary-8.json").read_text()) == json.loads((short / "summary.json").read_text())
        (event,) = read_lineage(run)
        assert (event["event"], event["step"], event["to"], event["optimizer.extension"]) == (
            *("extended", 8, 16),
            "rewarm",
        )
    rates = [line["learning_rate"] for line in lines(through)]
    assert rates[8] == pytest.approx(config.optimizer.min_learning_rate)
    assert rates[9] == pytest.approx(config.optimizer.learning_rate)
    assert rates[10:] == sorted(rates[10:], reverse=True)

    # A finished extension can be extended again, by the same rule only.
    with pytest.raises(RunError, match=r"optimizer\.extension: 'rewarm' there, 'constant' now"):
        execute(["train", str(through), "train.steps=20", "optimizer.extension=constant"])
    # Commands that do not name the run say what to do.
    again = overrides(short.parents[1], "train.steps=8", f"run.dir={through.parent}", "run.name=run")
    with pytest.raises(RunError, match=r"extended to 16 steps: unipool train .*run goes on with it"):
        execute(["train", *again])
    longer = overrides(short.parents[1], "train.steps=20", f"run.dir={short.parent}")
    with pytest.raises(RunError, match=r"To extend it once it is finished: unipool train .*tiny train\.steps=20"):
        execute(["train", *longer])


def test_a_finished_run_is_shown_and_an_unfinished_one_not_extended(
    short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(short, tmp_path)
    assert execute(["train", str(run)]) == 0
    assert f"to extend it: unipool train {run} train.steps=+N" in capsys.readouterr().out
    (run / "summary.json").unlink()
    for word in ("train.steps=+4", "train.steps=12"):
        with pytest.raises(RunError, match=r"train\.steps=12: .*has not finished its 8 steps"):
            execute(["train", str(run), word])
    with pytest.raises(RunError, match=r"train\.steps: 8 there, 4 now"):
        execute(["train", str(run), "train.steps=4"])
    assert load_config(run / "config.yaml").train.lengths == (8,)


@pytest.mark.parametrize("word", ["train.steps=+0", "train.steps=+x", "train.steps=+1e3"])
def test_steps_to_add_are_a_number(short: Path, word: str) -> None:
    with pytest.raises(ConfigError, match="give one number of steps to add"):
        execute(["train", str(short), word])


@pytest.mark.parametrize("options", [[], ["--multirun"]])
def test_steps_are_added_to_a_run_that_is_named(options: list[str]) -> None:
    with pytest.raises(ConfigError, match="no run is named"):
        execute(["train", *options, "train.steps=+2000"])


def extended(config: Config, *lengths: int) -> Config:
    train = dataclasses.replace(config.train, earlier_steps=lengths[:-1], steps=lengths[-1])
    return dataclasses.replace(config, train=train)


def test_an_extension_moves_no_phase_of_a_lock() -> None:
    config = tiny_config("unipool_lock", "train.eval_every=5", "lock.entropy_target=2")
    longer = extended(config, config.train.steps, 500)
    assert lock_schedule(longer) == lock_schedule(config)
    assert problems(longer) == problems(config)
    document = to_document(config, new_record(config), 0)
    assert from_document(longer, document, 0) == new_record(config)


def test_constant_extensions_at_rate_zero_are_refused() -> None:
    config = extended(compose_config(["optimizer.min_learning_rate=0", "train.steps=8"]), 8, 16)
    assert any("optimizer.extension=constant" in problem for problem in problems(config))
    rewarmed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, extension="rewarm"))
    assert problems(rewarmed) == []
    assert any("train.earlier_steps=[20]" in problem for problem in problems(extended(rewarmed, 20, 16)))
    assert "stays at optimizer.min_learning_rate=0.0003" in extension_notice(
        OptimizerConfig(min_learning_rate=3e-4), (280, 300)
    )


def test_repeating_an_extension_needs_an_end_in_between(tmp_path: Path) -> None:
    stored = extended(compose_config([]), 280, 300)  # not finished: no summary here
    assert with_more_steps(tmp_path, stored, stored, 20).train.lengths == (280, 300)
    with pytest.raises(RunError, match="has not finished its 300 steps"):
        with_more_steps(tmp_path, stored, stored, 21)


def test_a_run_starts_with_the_parameters_of_another(short: Path, tmp_path: Path) -> None:
    place = short.parents[1]
    new = ["train.steps=8", "train.checkpoint_every=4", "train.log_every=1", f"run.dir={tmp_path}", "train.seed=3"]
    new.append("train.keep_checkpoints=20")
    words = overrides(place, *new, f"run.init_from={short}")
    stepped: list[Any] = []
    shared = loop.make_train_step

    def make(config: Config, mesh: Any) -> Any:
        step = shared(config, mesh)

        def run(state: Any, batch: Any) -> Any:
            stepped.append(jax.device_get(state))
            return step(state, batch)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", make)
        assert execute(["train", *words]) == 0
    first, parent = stepped[0], final_state(load_config(short / "config.yaml"), short)
    assert int(first.step) == 0
    for path, leaf in jax.tree_util.tree_leaves_with_path({"params": first.params}):
        np.testing.assert_array_equal(leaf, parent[jax.tree_util.keystr(path)])
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(first.opt_state))
    (event,) = read_lineage(tmp_path / "tiny")
    assert (event["event"], event["parent"], event["parent_step"]) == ("started", str(short), 8)
    assert len(event["parent_sha256"]) == 64
    # The run resumes without its parent, and starts once.
    assert execute(["train", str(tmp_path / "tiny")]) == 0
    with pytest.raises(RunError, match=r"run\.init_from"):
        execute(["train", str(tmp_path / "tiny"), "run.init_from=null"])


def test_a_converted_run_records_its_parent_and_is_new(short: Path, tmp_path: Path) -> None:
    assert execute(["convert", "upcycle", str(short), "step=4", f"out={tmp_path / 'new'}", "method=unipool"]) == 0
    (event,) = read_lineage(tmp_path / "new")
    assert (event["event"], event["parent"], event["parent_step"]) == ("converted", str(short), 4)
    config, weights = read_run(str(short))
    write_run(tmp_path / "again", extended(config, 4, 8), weights)  # of a run that was extended
    assert load_config(tmp_path / "again" / "config.yaml").train.lengths == (8,)


def test_another_model_is_refused_by_name(short: Path, tmp_path: Path) -> None:
    place = short.parents[1]
    for words, names in (
        (["model.num_heads=1", "moe.top_k=2"], ["model.num_heads: 2 there, 1 here", "moe.top_k: 1 there, 2 here"]),
        (["moe.experts_per_layer=4"], ["experts in all pools: 4 there, 8 here"]),
    ):
        command = overrides(place, f"run.dir={tmp_path}", f"run.init_from={short}/checkpoints/4", *words)
        with pytest.raises(RunError) as caught:
            execute(["train", *command])
        assert all(name in str(caught.value) for name in names)
    for wrong, message in ((f"{short}/checkpoints/5", "not a checkpoint"), (str(tmp_path / "no"), "no run here")):
        with pytest.raises(RunError, match=rf"run\.init_from=.*{message}"):
            execute(["train", *overrides(place, f"run.dir={tmp_path}", f"run.init_from={wrong}")])


@pytest.fixture(scope="module")
def softmax(short: Path) -> Path:
    """The short run with a softmax router, which has no scale."""
    config, weights = read_run(str(short))
    weights.params["pools"]["layers"]["mixture"].pop("scale")
    folder = short.parent / "softmax"
    write_run(folder, dataclasses.replace(config, moe=dataclasses.replace(config.moe, router="softmax")), weights)
    return folder


def started(parent: Path, *words: str) -> tuple[Any, dict[str, Any]]:
    """The first state of a run from `parent`, and its lineage; a norm router unless `words` say otherwise."""
    config = compose_config(overrides(parent.parents[1], f"run.init_from={parent}", "train.seed=7", *words))
    return warm_state(config, state_shapes(config), load_tokenizer("bytes").sha256)


def test_new_parameters_are_allowed_by_name(softmax: Path) -> None:
    config = load_config(softmax / "config.yaml")
    state, lineage = started(softmax, "run.allow_new=[moe.router,*.mixture.scale]")
    assert lineage["new_parameters"] == ["pools.layers.mixture.scale"]
    assert lineage["changed_settings"] == ["moe.router"]
    parent = final_state(config, softmax)
    scale = state.params["pools"]["layers"]["mixture"].pop("scale")
    np.testing.assert_array_equal(scale, np.ones_like(scale))
    for path, leaf in jax.tree_util.tree_leaves_with_path({"params": state.params}):
        np.testing.assert_array_equal(leaf, parent[jax.tree_util.keystr(path)])
    # Its moments are there too, and zero.
    assert "scale" in state.opt_state[1][0].mu["pools"]["layers"]["mixture"]


@pytest.mark.parametrize(
    ("allowed", "words", "message"),
    [
        ("", [], "moe.router: 'softmax' there, 'norm' here"),
        ("moe.router", [], "params.pools.layers.mixture.scale: absent in the checkpoint"),
        ("*scale", [], "moe.router: 'softmax' there"),
        ("moe.router,*scale,pools.*.query", [], "run.allow_new=pools.*.query: nothing of this name is new"),
        ("*", ["moe.experts_per_layer=4"], "pools.layers.mixture.router: in the checkpoint, but not as expected here"),
    ],
)
def test_nothing_else_may_be_new(softmax: Path, allowed: str, words: list[str], message: str) -> None:
    with pytest.raises(RunError) as caught:
        started(softmax, f"run.allow_new=[{allowed}]", *words)
    assert message in str(caught.value)


def test_what_may_be_new_needs_a_parent() -> None:
    (problem,) = problems(compose_config(["run.allow_new=[x]"]))
    assert "run.allow_new=[x]: unused without run.init_from" in problem


def test_what_the_new_model_lacks_is_refused_whatever_is_allowed(short: Path) -> None:
    with pytest.raises(RunError, match=r"pools.layers.mixture.scale: in the checkpoint, but not as expected here"):
        started(short, "moe.router=softmax", "run.allow_new=[*]")


def test_what_only_rounds_or_counts_the_same_experts_is_no_other_architecture() -> None:
    config = compose_config(["moe.experts_per_layer=8"])
    other = compose_config(["moe.experts_per_layer=16", "pool.fraction=0.5", "model.remat=full", "model.init_std=1"])
    assert architecture_differences(config, other) == []
    assert architecture_differences(config, compose_config(["attention.kind=window", "moe.experts_per_layer=8"])) == []
    biased = dataclasses.replace(config, loss=dataclasses.replace(config.loss, balance="expert_bias"))
    assert architecture_differences(config, biased) == ["loss.balance=expert_bias: False there, True here"]
