"""From a trained checkpoint to numbers, figures and a page."""

from __future__ import annotations

import io
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

import oracles
from runner import overrides, write_text
from test_compare import check_page
from tiny import tiny_batch, tiny_config, tiny_state
from unipool_jax.analysis import figures, routing_figures
from unipool_jax.analysis.analyse import analyse
from unipool_jax.analysis.command import expert_devices
from unipool_jax.analysis.figures import Series
from unipool_jax.analysis.history import layers_of, read_history, series_of
from unipool_jax.analysis.page import Part, Table, write_page
from unipool_jax.analysis.probe import Condition, Difference, Probe
from unipool_jax.analysis.report import _probe, facts, parts
from unipool_jax.analysis.requests import AnalysisRequest
from unipool_jax.analysis.windows_figure import windows_figure
from unipool_jax.cli.main import execute
from unipool_jax.config.compose import compose_config, save_config
from unipool_jax.config.files import FileError
from unipool_jax.config.schema import ConfigError
from unipool_jax.config.words import from_words
from unipool_jax.moe.scope import visible_experts
from unipool_jax.training import loop
from unipool_jax.training.checkpoint import CheckpointError, Checkpoints, make_meta
from unipool_jax.training.run_folder import RunError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model with checkpoints of steps 10 and 20."""
    folder = tmp_path_factory.mktemp("run")
    config = compose_config(overrides(folder, "train.steps=20", "train.checkpoint_every=10", "train.log_every=5"))
    assert loop.train(config) == 0
    return folder / "runs" / "tiny"


def test_the_command_writes_what_a_run_knows_and_more(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["analyse", str(run), "expert_parallel=2", "draws=1"]) == 0
    out = run / "analysis" / "20"
    assert f"report: {out / 'report.html'}" in capsys.readouterr().out
    found = json.loads((out / "analysis.json").read_text())
    (last,) = (line for line in read_history(run) if line["kind"] == "valid")
    summary = json.loads((run / "summary.json").read_text())
    assert found["loss"] == pytest.approx(last["loss"], abs=1e-6)
    assert found["tokens"] == last["tokens"] == summary["results"]["valid"]["tokens"]
    assert (found["text"], found["own_text"]) == (last["text"], True)
    np.testing.assert_allclose(found["routing"]["routing/zero_gates"], last["routing/zero_gates"])
    assert found["probe"]["learned"] == pytest.approx(last["loss"], abs=1e-6)
    assert np.array(found["usage"]["counts"]).sum() == 2 * found["tokens"]
    assert sum(found["unique_experts"]["tokens_by_number"]) == found["tokens"]
    assert found["co_use"]["observed"][0][0] == 1.0
    assert found["device_load"]["expert_parallel"] == 2
    assert [c["candidates"] for c in found["probe"]["conditions"]] == ["full_pool", "full_pool"]
    names = {path.stem for path in out.glob("*.png")}
    assert names == {
        *("usage", "ownership", "co_use", "favourites", "layers"),
        *("unique", "similarity", "probe", "loss", "load", "zero_gates"),
    }
    page = check_page(out / "report.html")
    assert page.images == len(names)


def test_another_step_split_and_folder(run: Path, tmp_path: Path) -> None:
    other = f"data.files=[{write_text(tmp_path / 'other.jsonl', documents=30)}]"
    words = [f"run={run.parent}/latest", "step=10", "split=test", "draws=0", f"out={tmp_path}", other]
    assert execute(["analyse", *words]) == 0
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert (found["step"], found["split"], found["probe"], found["own_text"]) == (10, "test", None, False)
    assert "not the text that the run was trained beside" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "probe.png").exists()


def test_single_batches_are_looked_at_apart() -> None:
    """Device load of a batch is averaged over batches, of which each may lean to another side."""
    config = tiny_config("unipool", "moe.top_k=2", "moe.score_constant=one")
    state, batches = tiny_state(config), [tiny_batch(config, seed) for seed in range(2)]
    batches[1].weights[-1] = batches[1].weights[-2, 3:] = 0
    whole = analyse(config, state.params, state.balance, lambda: batches, devices=8, draws=0)
    each = [analyse(config, state.params, state.balance, partial(list, [b]), devices=8, draws=0) for b in batches]
    assert np.array_equal(whole.counts_LE, each[0].counts_LE + each[1].counts_LE)
    tokens = [int(batch.weights.sum()) for batch in batches]
    assert [one.tokens for one in each] == tokens
    assert [whole.tokens, *whole.counts_LE.sum(axis=1)] == [tokens[0] + tokens[1], *[2 * sum(tokens)] * 4]
    assert whole.loss == pytest.approx(np.average([one.loss for one in each], weights=tokens))
    np.testing.assert_allclose(whole.common_LL, np.average([one.common_LL for one in each], axis=0, weights=tokens))
    loads = [(one.load.critical_path, one.load.whole_model) for one in each]
    assert whole.batch_load == pytest.approx(tuple(np.average(loads, axis=0, weights=tokens)))


def test_an_ordinary_mixture_has_no_shared_pool_to_show() -> None:
    config = tiny_config("vanilla")
    state = tiny_state(config)
    found = analyse(config, state.params, state.balance, lambda: [tiny_batch(config)], draws=0)
    assert found.unique_mean == found.unique_chance == 4.0
    assert found.common_LL.tolist() == np.eye(4).tolist()
    names = [part.figure[0] for part in parts(found, []) if part.figure]
    assert names == ["usage", "layers", "similarity"]
    assert facts(found)["experts in use"].endswith("of 8")


@pytest.mark.parametrize("rule", ["sliding", "runs"])
def test_windows_by_numpy(rule: str) -> None:
    """What an analysis of windows counts, by the model in NumPy, token by token."""
    ends = ["pool.ends=1"] if rule == "runs" else []
    config = tiny_config("ring", "moe.experts_per_layer=2", f"pool.starts={rule}", "pool.span=2", *ends)
    state, batch = tiny_state(config), tiny_batch(config)
    batch.weights[-1] = 0
    found = analyse(config, state.params, state.balance, lambda: [batch], devices=2, draws=0)
    truth, text_N = oracles.Forward(config, state.params, batch.inputs), batch.weights.reshape(-1) > 0
    np.testing.assert_array_equal(found.counts_LE, truth.counts(batch.weights))
    assert not found.usage_map[~found.visible].any()
    zero = [np.take_along_axis(s, e, 1).max(axis=1) == 0 for s, e in zip(truth.scores, truth.experts, strict=True)]
    np.testing.assert_allclose(found.zero_gates_L, [layer_N[text_N].mean() for layer_N in zero])
    assert found.zero_gates_L.max() > 0
    chosen_LN = np.array(truth.experts)[:, text_N, 0]
    assert found.unique_mean == pytest.approx(np.mean([len(set(token)) for token in chosen_LN.T]))
    np.testing.assert_allclose(found.common_LL, (chosen_LN[:, None] == chosen_LN).mean(axis=2))
    windows = config.windows
    assert windows is not None
    seen = [set(np.flatnonzero(row).tolist()) for row in windows.visible()]
    together = [
        [i != j and any({i, j} <= s for s in seen) for j in range(windows.experts)] for i in range(windows.experts)
    ]
    assert found.seen_together[0].tolist() == together
    # Every other expert is on the same of two devices.
    even = found.counts_LE[:, ::2].sum(axis=1) / found.counts_LE.sum(axis=1)
    np.testing.assert_allclose(found.load.by_layer_L, 2 * np.maximum(even, 1 - even))
    if rule == "sliding":
        return
    sections = parts(found, [])
    words = " ".join(word for part in sections for word in part.words)
    # Two of four layers share two experts; the others own theirs.
    assert "(uniform sharing: 50.0%)" in words
    assert "Not counted are 4 experts" in words
    drawn = [part.figure for part in sections if part.figure]
    assert {name for name, _ in drawn} >= {"usage", "zero_gates", "ownership", "co_use", "layers", "similarity"}
    assert all(_pixels(draw).shape[1] == 1118 for _, draw in drawn)


def test_requests_are_parsed_and_mistakes_named() -> None:
    assert from_words(AnalysisRequest, []) == AnalysisRequest()
    assert from_words(
        AnalysisRequest, ["runs/a", "draws=0", "train.eval_batches=3", "kernels.implementation=xla"]
    ) == AnalysisRequest(
        run="runs/a", draws=0, overrides=(("train.eval_batches", 3), ("kernels.implementation", "xla"))
    )
    for word in (
        "draws=-1",
        "seed=x",
        "split=dev",
        "model.num_layers=2",
        "nonsense=1",
        "expert_parallel=0",
        "data.stores=[a",
    ):
        with pytest.raises(ConfigError, match=re.escape(word.partition("=")[0])):
            from_words(AnalysisRequest, [word])
    with pytest.raises(ConfigError, match="runs/b: not understood"):
        from_words(AnalysisRequest, ["runs/a", "runs/b"])


def test_devices_have_to_divide_the_experts() -> None:
    assert [expert_devices(None, experts) for experts in (96, 48, 12, 7, 1)] == [8, 8, 6, 7, 1]
    with pytest.raises(ConfigError, match=r"expert_parallel=5: 12 experts .* \[1, 2, 3, 4, 6, 12\]"):
        expert_devices(5, 12)


def test_what_cannot_be_analysed_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run here"):
        execute(["analyse", str(tmp_path)])
    with pytest.raises(CheckpointError, match="no complete checkpoint of step 7"):
        execute(["analyse", str(run), "step=7"])
    with pytest.raises(ConfigError, match="expert_parallel=3"):
        execute(["analyse", str(run), "expert_parallel=3"])


def test_history_survives_a_torn_line(tmp_path: Path) -> None:
    lines = ['{"kind": "train", "step": 1, "x": 2.0}', '{"kind": "train", "step": 2, "x": null}', '{"kind": "tra']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    found = series_of(read_history(tmp_path), "train", "x")
    assert found is not None
    assert (found.x.tolist(), found.y.tolist()) == ([1], [[2.0]])
    assert series_of(read_history(tmp_path), "valid", "x") is None
    assert read_history(tmp_path / "nowhere") == []


def test_a_metric_of_layers_over_steps() -> None:
    lines = [{"kind": "train", "step": step, "x": [0.5, step]} for step in (1, 4)]
    found = layers_of(lines, "train", "x", 2)
    assert (found.x.tolist(), found.y.tolist()) == ([1, 4], [[0.5, 0.5], [1.0, 4.0]])
    assert layers_of(lines, "valid", "x", 2).y.shape == (2, 0)
    for damaged in ([0.5], [0.5, "a"], 3.0):
        with pytest.raises(FileError, match=r"train line of step 9: x is .*, expected 2 numbers"):
            layers_of([*lines, {"kind": "train", "step": 9, "x": damaged}], "train", "x", 2)


def _pixels(draw: figures.Draw, *, dark: bool = False) -> np.ndarray:
    return image.imread(io.BytesIO(figures.png(draw, dark=dark)))


@pytest.mark.parametrize(("layers", "groups", "experts"), [(2, 1, 2), (48, 1, 384), (12, 12, 8)])
def test_figures_of_the_smallest_and_the_largest_model(layers: int, groups: int, experts: int) -> None:
    random = np.random.default_rng(0)
    counts = random.integers(0, 50, (layers, groups * experts))
    square = random.random((layers, layers))
    draws: list[figures.Draw] = [
        lambda: routing_figures.usage_figure(counts),
        lambda: routing_figures.ownership_figure(counts),
        lambda: routing_figures.co_use_figure(square, square),
        lambda: routing_figures.layers_figure(square[0], square[0], square[0] + 1, np.full(layers, experts), 8),
        lambda: routing_figures.unique_figure(random.integers(0, 9, layers + 1), 3.0, 3.5),
        lambda: routing_figures.similarity_figure(random.random((groups, experts, experts))),
        lambda: routing_figures.coverage_figure([1, 2], [2, 4], [4, 8], [0.5, 0.9]),
    ]
    for draw in draws:
        assert _pixels(draw).shape[1] == 1118


def test_maps_are_drawn_to_one_scale() -> None:
    """Every layer's row is colored where it sees an expert, in the color of how many layers do."""
    designs = {name: tiny_config(name) for name in ("vanilla", "unipool", "ring", "tied_inner")}
    figure = windows_figure(designs)
    colors: dict[int, set[tuple[float, ...]]] = {}
    for axes, config in zip(figure.axes, designs.values(), strict=False):
        image = np.asarray(axes.get_images()[0].get_array())
        visible = visible_experts(config)
        assert ((image[:, :, 3] > 0) == visible).all()
        assert axes.get_xlim() == figure.axes[0].get_xlim()
        for layer, expert in zip(*np.nonzero(visible), strict=True):
            colors.setdefault(int(visible[:, expert].sum()), set()).add(tuple(image[layer, expert]))
    assert sorted(colors) == [1, 3, 4]
    assert all(len(found) == 1 for found in colors.values())
    assert len(set.union(*colors.values())) == 3


def test_light_and_dark_have_the_right_paper() -> None:
    series = Series(np.arange(5), np.arange(10.0).reshape(2, 5))

    draw = partial(figures.curves_figure, {"a": series, "b": series}, "loss")
    assert _pixels(draw)[0, 0, :3].tolist() == [1.0, 1.0, 1.0]
    assert _pixels(draw, dark=True)[0, 0, :3].max() < 0.15


def test_probe_figure_and_page(tmp_path: Path) -> None:
    one = Difference(0.1, 0.01)
    conditions = [Condition(c, g, [one, one], one) for c in ("full_pool", "top_8") for g in ("learned", "own")]  # type: ignore[arg-type]
    probe = Probe(3.0, [2, 3], 1, conditions, 10)
    page = write_page(
        tmp_path,
        "<b>title</b> & more",
        "sub",
        {"loss": "3.0"},
        [
            Part(
                "Probe",
                ["a < b"],
                ("probe", lambda: routing_figures.probe_figure(probe)),
                "alt",
                Table(["a"], [["<1>"]]),
            )
        ],
        "python",
    )
    text = page.read_text()
    assert "&lt;b&gt;title&lt;/b&gt; &amp; more" in text
    assert "a &lt; b" in text
    assert check_page(page).images == 1


@pytest.mark.parametrize(
    ("mean", "items", "said"),
    [
        (0.1, 30, "+0.0795 to +0.1205; that the choice matters is shown."),
        # Ten standard errors, but of two windows.
        (0.1, 2, "that the choice matters is not shown: 2 of at least 3 pairs."),
        (0.01, 30, "-0.0105 to +0.0305; that the choice matters is not shown: the interval holds 0."),
    ],
)
def test_the_probe_says_what_it_shows(mean: float, items: int, said: str) -> None:
    value = Difference(mean, 0.01)
    probe = Probe(3.0, [2, 3], 1, [Condition("full_pool", "learned", [value], value)], items)
    words = " ".join(_probe(probe, compose_config([]), 0.0).words)
    assert said in words
    assert "no expert" not in words
    assert "25.0% of the tokens have no expert" in " ".join(_probe(probe, compose_config([]), 0.25).words)
    windowed = " ".join(_probe(probe, compose_config(["method=ring"]), 0.0).words)
    assert "from the layer's window" in windowed
    assert "full pool" not in windowed


def test_dense_models_are_refused(tmp_path: Path) -> None:
    config = compose_config(overrides(tmp_path, "method=dense", "moe.experts_per_layer=1", "train.steps=1"))
    save_config(config, tmp_path / "config.yaml")
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": np.zeros(1)}, make_meta(config, 1, None))
    with pytest.raises(RunError, match=r"moe\.router=none"):
        execute(["analyse", str(tmp_path)])
