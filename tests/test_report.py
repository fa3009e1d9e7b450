"""Published parameter totals, exactly (method M1.9, M2.3, M2.4)."""

from __future__ import annotations

import json

import pytest

from unipool_jax.config.compose import compose_config
from unipool_jax.model.report import count_parameters, describe

TOTALS = {
    "182m": (777_898_764, 777_087_744, 182_471_424),
    "469m": (2_588_460_056, 2_583_938_048, 469_812_224),
    "650m": (3_833_799_716, 3_823_477_760, 652_289_024),
    "830m": (5_081_498_672, 5_063_017_472, 834_765_824),
    "978m": (5_741_815_320, 5_735_032_320, 978_396_672),
}


@pytest.mark.parametrize("scale", TOTALS)
def test_published_totals(scale: str) -> None:
    for method, total in zip(("unipool", "vanilla", "dense"), TOTALS[scale], strict=True):
        counts = count_parameters(compose_config([f"scale={scale}", f"method={method}"]))
        assert counts["total"] == total, method
        # A token uses what the dense model has, whatever the pool.
        assert counts["active"] == TOTALS[scale][2], method


@pytest.mark.parametrize(
    ("overrides", "millions"),
    [
        (["scale=182m", "pool.experts=64"], 551.1),
        (["scale=182m", "pool.fraction=0.5"], 437.7),
        (["scale=469m", "pool.experts=128"], 1782),
        (["scale=650m", "pool.experts=96"], 1411),
        (["scale=830m", "pool.fraction=0.416"], 2252),
        (["scale=182m", "moe.experts_per_layer=16", "moe.top_k=2"], 1458),
        (["scale=182m", "moe.experts_per_layer=32", "moe.top_k=4"], 2819),
    ],
)
def test_published_reduced_and_finer_pools(overrides: list[str], millions: float) -> None:
    total = count_parameters(compose_config(overrides))["total"]
    assert total / 1e6 == pytest.approx(millions, abs=0.06 if millions < 1000 else 0.6)


@pytest.mark.parametrize(("experts", "top_k", "millions"), [(16, 2, 267.4), (32, 4, 437.3)])
def test_published_active_parameters(experts: int, top_k: int, millions: float) -> None:
    config = compose_config(["scale=182m", f"moe.experts_per_layer={experts}", f"moe.top_k={top_k}"])
    assert count_parameters(config)["active"] / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("implementation", ["pallas_tpu", "mosaic_gpu"])
def test_no_kernel_runs_to_count_parameters(implementation: str) -> None:
    """Nor to make first weights: where kernels would be interpreted, Flax refuses the scan around them."""
    config = compose_config(["scale=182m", "model.num_layers=2", f"kernels.implementation={implementation}"])
    assert count_parameters(config) == count_parameters(compose_config(["scale=182m", "model.num_layers=2"]))


def test_the_report_ends_with_one_json_line() -> None:
    text = describe(compose_config(["scale=978m"]))
    parameters = json.loads(text.splitlines()[-1])["parameters"]
    assert parameters["total"] == 5_741_815_320
    assert parameters["embeddings"] == 157_286_400
    assert parameters["attention"] == 141_557_760
    assert parameters["experts"] == 5_435_817_984
    assert parameters["routers"] == 7_077_888
    assert parameters["norms"] == 75_264
    assert parameters["scales"] == 24
