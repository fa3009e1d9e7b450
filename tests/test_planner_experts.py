"""What bounds the expert kernels, against the formulas, and its figure."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from unipool_jax.analysis.figures import png
from unipool_jax.analysis.roofline_figure import roofline_figure
from unipool_jax.config.chips import CHIPS
from unipool_jax.config.compose import compose_config
from unipool_jax.kernels.tpu_tiles import tile_rows
from unipool_jax.planner.experts import expert_kernels
from unipool_jax.planner.group_rows import expected_tile_rows
from unipool_jax.planner.report import count_step


@pytest.mark.parametrize(("method", "experts"), [("unipool", 96), ("vanilla", 8)])
def test_intensity_is_that_of_a_gated_ffn(method: str, experts: int) -> None:
    """Three products; gate, up and hidden rows are kept for the backward pass."""
    config, sequences = compose_config(["scale=182m", f"method={method}"]), 16
    found = expert_kernels(config, CHIPS["v5p"], sequences)
    rows, width, hidden = sequences * 1024, 768, 3072
    bank = 2 * 3 * width * hidden * experts
    moved = bank + 2 * rows * (2 * width + 4 * hidden)
    assert found.rows == pytest.approx(rows / experts)
    assert found.intensity == pytest.approx(6 * rows * width * hidden / moved)
    tile = tile_rows("TPU v5", rows / experts)
    assert found.tile_rows == tile
    assert found.padding == pytest.approx(expected_tile_rows(found.rows, tile) / found.rows)
    roof = found.intensity * 2765e9 / 459e12
    assert found.memory_share == pytest.approx(min(1, roof))
    assert found.peak_share == pytest.approx(min(roof, 1 / found.padding))


def test_rows_of_a_window_are_those_of_the_experts_that_a_layer_sees() -> None:
    found = [
        expert_kernels(compose_config(["scale=182m", f"method={m}"]), CHIPS["v5p"], 16) for m in ("unipool", "ring")
    ]
    assert found[1].rows == found[0].rows * 96 / 24
    assert found[1].intensity > found[0].intensity
    assert found[1].padding < found[0].padding


def test_chips_without_counted_tiles_have_no_padding() -> None:
    found = expert_kernels(compose_config(["scale=182m"]), CHIPS["h100"], 16)
    assert (found.tile_rows, found.padding) == (None, 1.0)
    assert found.peak_share == found.memory_share


def test_counts_need_no_compiler_and_follow_the_mesh() -> None:
    setting = ["scale=978m", "mode=plan", "mesh.topology=v5p:2x2x2", "mesh.data=-1"]
    alone = count_step(compose_config([*setting, "mesh.fsdp=1"]))
    split = count_step(compose_config([*setting, "mesh.fsdp=8"]))
    assert split.state_bytes == pytest.approx(alone.state_bytes / 8)
    assert {message.kind for message in alone.messages} == {"all-reduce"}
    assert "all-gather" in {message.kind for message in split.messages}


def test_the_corner_of_a_roof_is_peak_over_bandwidth() -> None:
    roofs = {name: (chip.flops, chip.hbm_bandwidth) for name, chip in CHIPS.items()}
    figure = roofline_figure(roofs, {"pool": 150.0, "per layer": 900.0})
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines if line.get_label() in roofs}
    for name, (peak, bandwidth) in roofs.items():
        x, y = np.asarray(lines[name].get_xdata()), np.asarray(lines[name].get_ydata())
        assert y.max() == pytest.approx(peak / 1e12)
        below = x < peak / bandwidth
        assert below.any()
        assert y[below] == pytest.approx(x[below] * bandwidth / 1e12)
    assert {text.get_text().strip() for text in axes.texts} == {"pool", "per layer"}
    assert png(partial(roofline_figure, roofs, {"pool": 150.0})).startswith(b"\x89PNG")
