"""What a layer has around the experts that it routes to, and layers without experts: size, start, place on a mesh.

The mathematics are compared with NumPy in `test_transformer.py` and with PyTorch in `test_pytorch_parity.py`.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from test_mesh import assert_equal, configure, trained
from tiny import AROUND_METHODS, tiny_batch, tiny_config, tiny_state
from unipool_jax.analysis.analyse import analyse
from unipool_jax.analysis.probe import deep_half
from unipool_jax.analysis.report import parts
from unipool_jax.config.compose import compose_config
from unipool_jax.config.rules import problems
from unipool_jax.model.report import count_parameters, describe
from unipool_jax.moe.lock import locked_tree
from unipool_jax.training import metrics
from unipool_jax.training.flops import flops_per_token
from unipool_jax.training.optimizer import decay_mask
from unipool_jax.training.zero_gates import zero_gate_warning

SHARED = ("moe.shared_experts=2", "moe.shared_expert_gate=true")
DENSE = ("moe.dense_layers=2", "moe.dense_ffn_size=1000")
pytestmark = pytest.mark.filterwarnings("ignore:NormRouter over")


def test_always_on_experts_are_counted_with_what_every_token_uses() -> None:
    base, more = (compose_config(["scale=182m", "method=unipool", *words]) for words in ((), SHARED))
    added = 12 * (3 * 768 * 2 * 3072 + 768)
    before, after = count_parameters(base), count_parameters(more)
    assert after["shared_experts"] == added
    assert after["experts"] == before["experts"]
    for name in ("total", "active"):
        assert after[name] - before[name] == added
    assert flops_per_token(more) - flops_per_token(base) == 6 * added


def test_dense_layers_and_depth_vectors_are_counted_and_leave_the_experts() -> None:
    """Ten of twelve layers have experts, eight each: 80, routers of 80 rows."""
    base = compose_config(["scale=182m", "method=unipool"])
    config = compose_config(["scale=182m", "method=unipool", "moe.depth_vectors=true", *DENSE])
    assert (config.mixture_layers, config.layers_per_pool, config.total_experts) == (10, 10, 80)
    counts, expert, dense = count_parameters(config), 3 * 768 * 3072, 3 * 768 * 1000
    assert counts["experts"] == 80 * expert
    assert (counts["dense_blocks"], counts["depth_vectors"]) == (2 * dense, 10 * 768)
    assert counts["routers"] == 10 * 80 * 768
    for name in ("attention", "embeddings", "norms"):
        assert counts[name] == count_parameters(base)[name]
    assert counts["active"] == count_parameters(base)["active"] - 2 * expert + 2 * dense + 10 * 768
    change = flops_per_token(config) - flops_per_token(base)
    assert change == 6 * (2 * (dense - expert) + 768 * (10 * 80 - 12 * 96))


def test_a_dense_layer_is_as_wide_as_what_a_token_visits_elsewhere() -> None:
    config = compose_config(["scale=182m", "moe.dense_layers=1", "moe.top_k=2", "moe.shared_experts=1"])
    assert config.dense_width == 3 * 3072


def test_the_report_numbers_layers_as_the_model_does() -> None:
    lines = describe(tiny_config("ring", "moe.dense_layers=1")).splitlines()
    assert "4 layers x 16, the first 1 dense of width 24" in lines[0]
    assert [line.split() for line in lines[2:5]] == [["1", "######"], ["2", "######"], ["3", "######"]]


def test_always_on_experts_start_as_experts_do() -> None:
    config = tiny_config("unipool", "model.hidden_size=64", "model.ffn_size=128", *SHARED)
    shared = tiny_state(config).params["pools"]["layers"]["shared"]
    assert shared["block"]["gate"].shape == (1, 4, 64, 256)
    for name, std in (("gate", 0.2), ("up", 0.2), ("down", 0.2 / math.sqrt(8))):
        assert float(np.std(shared["block"][name])) == pytest.approx(std, rel=0.02), name
    assert float(np.std(shared["sigmoid_gate"])) == pytest.approx(0.2, rel=0.2)


def test_depth_vectors_start_at_zero_and_do_not_decay() -> None:
    params = tiny_state(tiny_config("more", *SHARED, *DENSE, "model.init_std=0.02")).params
    decays = decay_mask(params)
    assert not np.asarray(params["pools"]["layers"]["depth"]).any()
    assert not decays["pools"]["layers"]["depth"]
    assert decays["pools"]["layers"]["shared"]["sigmoid_gate"]
    assert all(jax.tree.leaves(decays["dense"]["block"]))


def test_a_lock_divides_the_pool_among_the_layers_that_have_experts() -> None:
    config = tiny_config("unipool_lock", "moe.dense_layers=1", "moe.depth_vectors=true", *SHARED)
    before, after = tiny_state(config).params, config.after_lock()
    assert (after.pool.groups, after.experts_per_pool, after.locked) == (3, 2, True)
    dense = jax.device_get(before["dense"])
    moved = locked_tree(before, np.arange(6).reshape(3, 2))
    wanted = jax.eval_shape(lambda: tiny_state(after)).params
    assert jax.tree.map(np.shape, moved) == jax.tree.map(np.shape, wanted)
    jax.tree.map(np.testing.assert_array_equal, moved["dense"], dense)


def test_layers_are_numbered_as_in_the_model_wherever_they_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four layers are dense, so that the first with experts is number 2."""
    config = tiny_config("unipool", "moe.dense_layers=2")
    state, batches = tiny_state(config), [tiny_batch(config)]
    found = analyse(config, state.params, state.balance, lambda: batches)
    assert found.counts_LE.sum(axis=1).tolist() == [64, 64]
    assert found.probe is not None
    assert found.probe.layers == [2, 3]
    found = dataclasses.replace(found, counts_LE=np.array([[16, 16, 16, 16], [64, 0, 0, 0]]))
    layers = next(part for part in parts(found, []) if part.title == "Layer by layer")
    assert "Layer 3 is furthest below" in layers.words[0]
    assert layers.figure is not None
    figure = layers.figure[1]()
    assert [axes.xaxis.get_major_formatter()(1) for axes in figure.axes] == ["3"] * 3
    assert "in layer 3 (" in str(zero_gate_warning(np.array([0.0, 0.5]), config.moe.dense_layers))

    class Recorded(list[str]):
        def add_scalar(self, name: str, *_: float) -> None:
            self.append(name)

        def close(self) -> None:
            pass

    events = Recorded()
    monkeypatch.setattr(metrics, "Events", lambda *_: events)
    writer = metrics.MetricsWriter(tmp_path, 0, tensorboard=True, first_layer=config.moe.dense_layers)
    writer.write("train", 1, {"load/layer": [1.0, 2.0], "load/pool": [1.5]})
    writer.close()
    assert events == ["train/load/layer/02", "train/load/layer/03", "train/load/pool/00"]


def test_the_deep_half_is_that_of_the_whole_model() -> None:
    """Of twelve layers 6 to 11, of which 2 are dense: 4 to 9 among the ten with experts."""
    assert deep_half(10, 2) == [4, 5, 6, 7, 8, 9]
    assert deep_half(4, 8) == [0, 1, 2, 3]


def test_a_mesh_trains_all_of_it_as_one_device_does() -> None:
    """Over fsdp, expert and tensor at once, with the experts of windows spread over devices; blocks stay in place."""
    config = configure("more", *SHARED, "moe.dense_layers=1", "pool.starts=ring")
    assert_equal(trained(config, (1, 2, 2, 2)), trained(config, None))


@pytest.mark.parametrize("method", AROUND_METHODS)
def test_the_methods_are_valid_at_182m(method: str) -> None:
    config = compose_config(["scale=182m", f"method={method}", "mode=describe"])
    assert problems(config) == []
    assert (config.method_name, config.total_experts, config.shared_width) == (method, 96, 3072)
    assert (config.widths is not None, config.moe.depth_vectors) == ((True,) * 2 if method == "more" else (False,) * 2)
