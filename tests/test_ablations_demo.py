"""The ablation study: every case is a configuration that can be run, and each control changes what it is about."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.ablations_demo import CONTROLS, ROWS, TRAIN, command_of, compare_recorded, record, recorded
from unipool_jax.config.compose import compose_config, save_config
from unipool_jax.config.rules import validate
from unipool_jax.config.schema import Config
from unipool_jax.config.settings_table import frozen_differences


def config_of(name: str, *more: str) -> Config:
    (case,) = (case for case in ROWS + CONTROLS if case.name == name)
    _, script, *overrides = command_of(case, 1, 200, Path("runs"), list(more))
    assert script == str(TRAIN)
    return compose_config(overrides)


def test_every_case_can_be_run() -> None:
    assert len(ROWS) == 9
    assert len({case.name for case in ROWS + CONTROLS}) == 16
    for case in ROWS + CONTROLS:
        validate(config_of(case.name))
    assert len({config_of(case.name).total_experts for case in ROWS}) == 1


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("pool_of_8", ["pool.experts"]),
        ("half_pool", ["pool.fraction"]),
        ("double_pool", ["pool.experts"]),
        ("weak_balance", ["loss.pool_coefficient"]),
        ("strong_balance", ["loss.pool_coefficient"]),
        ("previous_statistics", ["loss.pool_statistics"]),
        ("unipool_4_pools", ["pool.groups"]),
    ],
)
def test_a_control_changes_one_thing(name: str, changed: list[str]) -> None:
    assert frozen_differences(config_of("unipool"), config_of(name)) == changed


def test_controls_span_what_they_say() -> None:
    assert config_of("pool_of_8").total_experts == config_of("vanilla").experts_per_pool == 8
    sizes = [config_of(name).total_experts for name in ("half_pool", "unipool", "double_pool")]
    assert sizes == [48, 96, 192]
    weak, middle, strong = (
        config_of(name).loss.pool_coefficient for name in ("weak_balance", "unipool", "strong_balance")
    )
    assert (middle / weak, strong / middle) == (pytest.approx(10), pytest.approx(10))


def test_results_are_collected_as_far_as_they_are_there(tmp_path: Path) -> None:
    """Rows beside the published ones, controls beside unipool; a run that has not finished is left out."""
    runs, out = tmp_path / "runs", tmp_path / "out"
    cases = [case for case in ROWS + CONTROLS if case.name in ("vanilla", "unipool", "unipool_2_pools", "half_pool")]
    for case in cases:
        for seed in (1, 2):
            _, _, *overrides = command_of(case, seed, 40, runs, [])
            folder = runs / f"{case.name}-seed{seed}"
            folder.mkdir(parents=True)
            save_config(compose_config(overrides), folder / "config.yaml")
            loss = 5.0 + seed - (case.published or 0.0) * -10
            lines = [{"kind": "valid", "step": step, "loss": loss + 1 / step} for step in (10, 20, 30, 40)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            result = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": None, "tokens": 10, "bytes": None}
            summary = {"step": 40, "tokens": 100, "results": {"valid": result}, "unigram": None}
            summary |= {"tokens_per_second": None, "experts_used": 1, "experts_total": 1, "busiest_over_mean": 1.0}
            if (case.name, seed) != ("unipool_2_pools", 2):
                (folder / "summary.json").write_text(json.dumps(summary))
                record(case, seed, runs, out)
    compare_recorded([1, 2], out)
    published = (out / "rows" / "published.md").read_text().splitlines()
    assert published[2:] == [
        "| vanilla | 2 | 6.5000 | - | - | - | - | +0.0000 |",
        "| unipool | 2 | 6.2120 | -0.2880 | -0.2880 to -0.2880 | 0 | not shown: 2 of at least 3 pairs | -0.0288 |",
        "| unipool_2_pools | 1 | 5.8960 | -0.1040 | - | - | not shown: 1 of at least 3 pairs | -0.0104 |",
    ]
    assert (out / "controls" / "report.html").exists()
    assert (out / "runs" / "half_pool-seed2" / "config.yaml").exists()
    assert not (out / "runs" / "unipool_2_pools-seed2").exists()
    vanilla, pools = (next(case for case in cases if case.name == name) for name in ("vanilla", "unipool_2_pools"))
    assert recorded(vanilla, 1, command_of(vanilla, 1, 40, runs, []), out)
    assert not recorded(pools, 2, command_of(pools, 2, 40, runs, []), out)
    with pytest.raises(SystemExit, match=r"train\.steps"):
        recorded(vanilla, 1, command_of(vanilla, 1, 80, runs, []), out)
