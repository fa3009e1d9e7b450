"""Small runs in this process: resume, signals, non-finite steps, failing saves, metrics, tracing."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runner import assert_same, final_state, overrides
from unipool_jax.cli.guard import guarded
from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import Config, ConfigError
from unipool_jax.data.errors import DataError
from unipool_jax.training import evaluate, loop
from unipool_jax.training.checkpoint import CheckpointError, Checkpoints
from unipool_jax.training.entry import run
from unipool_jax.training.metrics import CLOCKED
from unipool_jax.training.run_folder import RunError, RunFolder, find_run, run_name
from unipool_jax.training.sessions import read_sessions
from unipool_jax.training.state import TrainState
from unipool_jax.training.step import make_eval_step, make_train_step

pytestmark = pytest.mark.usefixtures("steps_are_shared")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with the text and its token store."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def configure(shared: Path, tmp_path: Path) -> Callable[..., Config]:
    """A tiny run of 12 steps in its own folder, with further settings."""

    def make(*more: str) -> Config:
        return compose_config(overrides(shared, "train.steps=12", f"run.dir={tmp_path / 'runs'}", *more))

    return make


@pytest.fixture(scope="module")
def uninterrupted(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A run of 12 steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    arguments = overrides(shared, "train.steps=12", f"run.dir={folder}", "train.log_every=2", "train.eval_every=4")
    config = compose_config([*arguments, "train.checkpoint_every=4"])
    assert loop.train(config) == 0
    return config, folder / "tiny"


def lines(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Metrics of a run without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in CLOCKED}
        for line in found
        if kind in (None, line["kind"])
    ]


def folder_of(config: Config) -> Path:
    return Path(config.run.dir) / run_name(config)


def steps_saved(config: Config) -> list[int]:
    with Checkpoints(folder_of(config) / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.steps()


Hook = Callable[[int, TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[Hook], None]:
    """Call a function after every training step, with the steps completed; it may replace the result."""

    def install(hook: Hook) -> None:
        shared = loop.make_train_step

        def make(config: Config, mesh: Any) -> Callable[..., Any]:
            train_step = shared(config, mesh)

            def step(state: TrainState, batch: Any) -> Any:
                state, metrics = train_step(state, batch)
                return hook(int(jax.device_get(state.step)), state, metrics)

            return step

        monkeypatch.setattr(loop, "make_train_step", make)

    return install


def kill_at(step: int, signum: int) -> Hook:
    def hook(now: int, state: TrainState, metrics: dict[str, jax.Array]) -> Any:
        if now == step:
            os.kill(os.getpid(), signum)
        return state, metrics

    return hook


def test_a_run_leaves_everything_that_is_promised(uninterrupted: tuple[Config, Path]) -> None:
    config, folder = uninterrupted
    assert [line["step"] for line in lines(folder, "train")] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines(folder, "valid")] == [4, 8, 12]
    train = lines(folder, "train")[0]
    wanted = {"loss/lm", "loss/balance", "loss/z", "loss/total", "perplexity", "learning_rate", "grad_norm", "tokens"}
    wanted |= {"router_scale", "load/layer", "load/pool", "load/busiest_over_mean", "experts/dead", "experts/used"}
    assert wanted <= train.keys()
    assert train["perplexity"] == pytest.approx(np.exp(train["loss/lm"]), rel=1e-6)
    assert train["loss/total"] == pytest.approx(train["loss/lm"] + train["loss/balance"], rel=1e-6)
    assert len(train["load/layer"]) == config.model.num_layers
    assert len(train["router_scale"]) == config.model.num_layers
    assert np.load(folder / "routing" / "12.npy").shape == (2, 4)
    assert steps_saved(config) == [4, 8, 12]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["results"]["valid"]["loss"] == lines(folder, "valid")[-1]["loss"]
    assert {"valid", "test"} == summary["results"].keys() == summary["unigram"].keys()
    assert summary["skipped_steps"] == 0


def test_the_speed_of_the_summary_is_that_of_the_run(uninterrupted: tuple[Config, Path]) -> None:
    folder = uninterrupted[1]
    text = (folder / "metrics.jsonl").read_text()
    found = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "train"]
    # Of 12 steps all but the first, which was compiled; 2 between lines, and 1 before the first line.
    steps = [1, 2, 2, 2, 2, 2]
    assert [line["tokens"] for line in found] == [count * 4 * 16 for count in (2, 4, 6, 8, 10, 12)]
    tokens = [line["tokens_per_second"] * line["seconds"] for line in found]
    assert tokens == pytest.approx([count * 4 * 16 for count in steps])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["tokens_per_second"] == pytest.approx(sum(tokens) / sum(line["seconds"] for line in found))
    assert summary["tokens_per_second_median"] == np.median([line["tokens_per_second"] for line in found])
    assert summary["mfu"] is None


def test_a_run_keeps_what_it_printed_and_where(uninterrupted: tuple[Config, Path]) -> None:
    folder = uninterrupted[1]
    log = (folder / "log.txt").read_text()
    said = ["==== 20", "compiling the training step\n", "compiled after ", "step  2/12  loss ", "elapsed"]
    said += ["compiling the evaluation\n", "valid loss"]
    places = [log.index(text) for text in [*said, "tokens per second: ", "experts in use"]]
    assert places == sorted(places)
    # What a run writes is for whoever the umask lets read it.
    made = [path for path in folder.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    (folder / ".lock").unlink()
    (folder / ".lock").touch()
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {stat.S_IMODE((folder / ".lock").stat().st_mode)}
    (session,) = read_sessions(folder)
    assert (session["step"], session["exit_code"]) == (0, 0)
    assert session["compile_seconds"] > 0


def test_the_logged_learning_rate_is_that_of_the_step(uninterrupted: tuple[Config, Path]) -> None:
    """Step s is update s - 1 of the schedule: one warm-up step, then half a cosine over the other eleven."""
    config, folder = uninterrupted
    optimizer = config.optimizer
    assert round(optimizer.warmup_fraction * 12) == 1
    for line in lines(folder, "train"):
        cosine = math.cos(math.pi * (line["step"] - 1 - 1) / 11)
        expected = (
            optimizer.min_learning_rate + (optimizer.learning_rate - optimizer.min_learning_rate) * (1 + cosine) / 2
        )
        assert line["learning_rate"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("signum", "code", "at"), [(signal.SIGTERM, 143, 5), (signal.SIGINT, 130, 8)])
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_bits(
    uninterrupted: tuple[Config, Path],
    configure: Callable[..., Config],
    after_step: Callable[[Hook], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    signum: int,
    code: int,
    at: int,
) -> None:
    config = configure("train.log_every=2", "train.eval_every=4", "train.checkpoint_every=4")
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    after_step(kill_at(at, signum))
    assert loop.train(config) == code
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert steps_saved(config)[-1] == at
    output = capfd.readouterr()
    assert f"saved step {at}" in output.out
    assert "stopping after this step" in output.err

    monkeypatch.undo()
    assert loop.train(config) == 0
    assert f"resuming after step {at}" in capfd.readouterr().out
    assert_same(final_state(config, uninterrupted[1]), final_state(config, folder_of(config)))
    # The evaluation that the signal at step 8 put off is made up for, in its place.
    assert lines(folder_of(config)) == lines(uninterrupted[1])
    assert [(s["step"], s["exit_code"]) for s in read_sessions(folder_of(config))] == [(0, code), (at, 0)]
    log = (folder_of(config) / "log.txt").read_text()
    assert log.count("==== ") == 2
    assert f"saved step {at}" in log
    assert " s as the last time\n" in log


def test_a_signal_between_two_looks_waits_for_the_next_step(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("train.eval_every=0", "train.checkpoint_every=0")
    looked, requested = 0, loop.StopRequest.requested

    def signalled_after(self: loop.StopRequest) -> bool:
        nonlocal looked
        looked, found = looked + 1, requested(self)
        if looked == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(loop.StopRequest, "requested", signalled_after)
    assert loop.train(config) == 143
    assert steps_saved(config) == [6]


def test_a_second_signal_is_not_held_back() -> None:
    stop = loop.StopRequest()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        while not stop.requested():
            time.sleep(0.001)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert stop.signum == signal.SIGINT


def test_a_finished_run_shows_its_table_again(
    uninterrupted: tuple[Config, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (uninterrupted[1] / "metrics.jsonl").read_bytes()
    assert loop.train(uninterrupted[0]) == 0
    output = capsys.readouterr().out
    assert "is finished" in output
    assert "unigram" in output
    assert "experts in use" in output
    assert (uninterrupted[1] / "metrics.jsonl").read_bytes() == before


def test_a_run_killed_before_its_summary_gets_it(
    uninterrupted: tuple[Config, Path], configure: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure("train.log_every=2", "train.eval_every=4", "train.checkpoint_every=4")
    assert loop.train(config) == 0
    (folder_of(config) / "summary.json").unlink()
    assert loop.train(config) == 0
    summaries = [json.loads((path / "summary.json").read_text()) for path in (uninterrupted[1], folder_of(config))]
    assert summaries[0]["results"] == summaries[1]["results"]
    assert lines(folder_of(config)) == lines(uninterrupted[1])


def poison(*steps: int) -> Hook:
    """Report steps as not finite, the way the step function does: state unchanged but for the step count."""

    def hook(now: int, state: TrainState, metrics: dict[str, jax.Array]) -> Any:
        if now in steps:
            metrics |= {"finite": jax.device_put(np.False_), "loss/lm": jax.device_put(np.float32(np.nan))}
        return state, metrics

    return hook


@pytest.mark.parametrize("at", [7, 8, 12])
def test_a_nonfinite_step_stops_the_run_and_overwrites_nothing(
    configure: Callable[..., Config], after_step: Callable[[Hook], None], capsys: pytest.CaptureFixture[str], at: int
) -> None:
    config = configure("train.checkpoint_every=4")
    after_step(poison(at))
    assert loop.train(config) == loop.EXIT_NONFINITE == 3
    assert steps_saved(config) == [step for step in (4, 8) if step < at]
    error = capsys.readouterr().err
    assert f"step {at}" in error
    assert "loss/lm nan" in error
    assert "grad_norm" in error
    assert f"checkpoints/{4 if at < 9 else 8}" in error
    (line,) = lines(folder_of(config), "nonfinite")
    assert (line["step"], line["loss/lm"]) == (at, "nan")
    assert not (folder_of(config) / "summary.json").exists()


def test_nonfinite_steps_can_be_skipped(
    configure: Callable[..., Config], after_step: Callable[[Hook], None], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure("train.nonfinite=skip")
    after_step(poison(3, 6))
    assert loop.train(config) == 0
    assert [line["step"] for line in lines(folder_of(config), "skipped")] == [3, 6]
    assert json.loads((folder_of(config) / "summary.json").read_text())["skipped_steps"] == 2
    assert "steps skipped (train.nonfinite=skip): 2" in capsys.readouterr().out


def test_a_real_nonfinite_gradient_is_caught(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = loop.initial_state

    def broken(*arguments: Any) -> TrainState:
        state = original(*arguments)
        return state._replace(params=jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.inf), state.params))

    monkeypatch.setattr(loop, "initial_state", broken)
    assert loop.train(configure()) == 3
    assert "step 1" in capsys.readouterr().err


def test_a_failed_save_stops_the_run_soon(configure: Callable[..., Config], after_step: Callable[[Hook], None]) -> None:
    config = configure("train.steps=4000", "train.checkpoint_every=4", "model.hidden_size=64", "train.eval_every=0")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    reached = 0

    def fill_disk(now: int, state: TrainState, metrics: dict[str, jax.Array]) -> Any:
        nonlocal reached
        reached = now
        if now == 7:
            while not (folder_of(config) / "checkpoints" / "4").exists():
                time.sleep(0.001)
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
        return state, metrics

    after_step(fill_disk)
    try:
        with pytest.raises(CheckpointError, match="newest complete checkpoint is step 4"):
            loop.train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert 8 <= reached <= 12  # at the latest, the next save finds out
    assert steps_saved(config) == [4]


def test_nothing_is_traced_twice(configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    jitted: list[tuple[str, Any]] = []

    def remember(name: str, make: Callable[..., Any]) -> Callable[..., Any]:
        def made(config: Config, mesh: Any) -> Any:
            function = make(config, mesh)
            jitted.append((name, function))
            return function

        return made

    monkeypatch.setattr(loop, "make_train_step", remember("train", make_train_step))
    monkeypatch.setattr(evaluate, "make_eval_step", remember("eval", make_eval_step))
    config = configure("train.eval_every=4", "train.checkpoint_every=4", "train.steps=16")
    assert loop.train(config) == 0
    assert [(name, function._cache_size()) for name, function in jitted] == [("eval", 1), ("train", 1)]

    # The same once more from a checkpoint in the middle: restored arrays must look like fresh ones.
    for step in (12, 16):
        path = folder_of(config) / "checkpoints" / str(step)
        path.rename(path.with_name(f"{step}.aside"))
    (folder_of(config) / "summary.json").unlink()
    jitted.clear()
    assert loop.train(config) == 0
    assert [(name, function._cache_size()) for name, function in jitted] == [("eval", 1), ("train", 1)]


def test_settings_that_decide_the_numbers_may_not_change(uninterrupted: tuple[Config, Path], shared: Path) -> None:
    arguments = overrides(shared, "train.steps=12", f"run.dir={uninterrupted[1].parent}", "train.checkpoint_every=4")
    changed = compose_config([*arguments, "optimizer.learning_rate=1e-3", "train.batch_size=8"])
    with pytest.raises(RunError) as error:
        loop.train(changed)
    message = str(error.value)
    assert "optimizer.learning_rate: 0.003 there, 0.001 now" in message
    assert "train.batch_size: 4 there, 8 now" in message
    assert "run.name" in message
    assert "train.eval_every" not in message
    assert loop.train(compose_config([*arguments, "train.log_every=1", "data.num_threads=1"])) == 0


def test_resume_settings(uninterrupted: tuple[Config, Path], shared: Path, configure: Callable[..., Config]) -> None:
    arguments = overrides(shared, "train.steps=12", f"run.dir={uninterrupted[1].parent}")
    with pytest.raises(RunError, match=r"run\.resume=never"):
        loop.train(compose_config([*arguments, "run.resume=never"]))
    with pytest.raises(RunError, match=r"run\.resume=required"):
        loop.train(configure("run.resume=required"))


def test_one_process_per_run_folder(configure: Callable[..., Config]) -> None:
    config = configure()
    with RunFolder(config), pytest.raises(RunError, match=f"process {os.getpid()} is training"):
        RunFolder(config)
    RunFolder(config).close()


def test_processes_that_do_not_share_the_run_folder_are_told(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unipool_jax.training.run_folder._SEEN_WITHIN", 0.2)
    config = configure()
    with pytest.raises(RunError, match=r"run\.dir must be on storage that all processes share"):
        RunFolder(config, writes=False)
    with RunFolder(config):
        RunFolder(config, writes=False).close()


def test_a_tokenizer_that_changed_its_ids_is_refused(
    uninterrupted: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = loop.open_corpus(uninterrupted[0].data, uninterrupted[0].model.vocab_size)
    monkeypatch.setattr(corpus.tokenizer, "sha256", "0" * 64)
    with (
        Checkpoints(uninterrupted[1] / "checkpoints", read_only=True) as checkpoints,
        pytest.raises(RunError, match="tokenizer"),
    ):
        loop.initial_state(uninterrupted[0], checkpoints, corpus)


def test_too_small_a_vocabulary_is_refused_before_anything_is_built(configure: Callable[..., Config]) -> None:
    config = configure("model.vocab_size=128")
    with pytest.raises((DataError, ConfigError), match=r"model\.vocab_size"):
        run(config)


def test_errors_become_messages_and_exit_codes(
    configure: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(lambda: run(configure("train.batch_size=6", "train.microbatch_size=4"))) == 2
    assert "train.batch_size" in capsys.readouterr().err
    assert guarded(lambda: run(configure("data.files=[/nowhere.txt]"))) in (1, 2)
    assert "nowhere.txt" in capsys.readouterr().err


def test_kernels_of_another_platform_are_refused(
    configure: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(lambda: run(configure("kernels.implementation=pallas_tpu"))) == 2
    assert "kernels.implementation=pallas_tpu: made for tpu; on cpu" in capsys.readouterr().err


def test_describe_prints_and_trains_nothing(
    configure: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure("mode=describe")
    assert guarded(lambda: run(config)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["parameters"]["total"] > 0
    assert not folder_of(config).exists()


def test_runs_are_found_by_name_or_as_the_latest(uninterrupted: tuple[Config, Path], tmp_path: Path) -> None:
    assert find_run(str(uninterrupted[1])) == uninterrupted[1]
    assert find_run(str(uninterrupted[1].parent / "latest")) == uninterrupted[1]
    with pytest.raises(RunError, match="no run here"):
        find_run(str(tmp_path / "other"))
    with pytest.raises(RunError, match=r"unipool train"):
        find_run(str(tmp_path / "latest"))


def test_default_names_tell_runs_apart() -> None:
    config = compose_config(["method=vanilla", "train.steps=70", "train.seed=5"])
    assert run_name(config) == "demo-vanilla-70steps-seed5"


def test_checkpoints_without_their_configuration_are_not_continued(configure: Callable[..., Config]) -> None:
    config = configure()
    (folder_of(config) / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(RunError, match=r"holds checkpoints but no config\.yaml"):
        RunFolder(config)
