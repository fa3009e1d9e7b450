"""Load figures against hand-made counts, the metrics file across resumes, and FLOPs of the published model."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path

import numpy as np
import pytest

from unipool_jax.analysis.history import read_history
from unipool_jax.config.files import FileError
from unipool_jax.config.schema import AttentionConfig, Config, ModelConfig, MoEConfig, PoolConfig
from unipool_jax.training.events import Events
from unipool_jax.training.flops import flops_per_token, peak_flops, utilization
from unipool_jax.training.metrics import (
    MetricsWriter,
    load_metrics,
    perplexity,
    pool_counts,
    routing_diagnostics,
)

COUNTS = np.array([[8, 0, 0, 0], [2, 2, 2, 2], [0, 4, 4, 0], [0, 0, 8, 0]], np.int32)


def test_one_pool_adds_up_all_layers() -> None:
    metrics = load_metrics(COUNTS, groups=1)
    assert pool_counts(COUNTS, 1).tolist() == [[10, 6, 14, 2]]
    assert metrics["load/layer"] == [4.0, 1.0, 2.0, 4.0]
    assert metrics["load/pool"] == [14 / 8]
    assert metrics["load/busiest_over_mean"] == 14 / 8
    assert (metrics["experts/dead"], metrics["experts/used"]) == (0, 4)


def test_experts_of_different_pools_are_different_experts() -> None:
    metrics = load_metrics(COUNTS, groups=2)
    assert pool_counts(COUNTS, 2).tolist() == [[10, 2, 2, 2], [0, 4, 12, 0]]
    assert metrics["load/pool"] == [10 / 4, 12 / 4]
    assert metrics["load/busiest_over_mean"] == 12 / 4
    assert (metrics["experts/dead"], metrics["experts/used"]) == (2, 6)
    assert load_metrics(COUNTS, groups=4)["experts/dead"] == 3 + 0 + 2 + 3


def test_counts_larger_than_int32_do_not_overflow() -> None:
    counts = np.full((4, 2), 2**30, np.int32)
    assert pool_counts(counts, 1).tolist() == [[2**32, 2**32]]
    assert load_metrics(counts, 1)["load/busiest_over_mean"] == 1.0


def test_nothing_routed_is_not_a_division_by_zero() -> None:
    zeros = np.zeros((2, 3), np.int32)
    assert load_metrics(zeros, 1)["load/layer"] == [0.0, 0.0]
    assert routing_diagnostics(zeros, 1)["routing/token_coverage_1"] == 0.0


def test_routing_diagnostics_by_hand() -> None:
    found = routing_diagnostics(COUNTS, groups=1)
    assert found["routing/entropy_bits"] == pytest.approx([0.0, 2.0, 1.0, 0.0])
    assert found["routing/top16_coverage"] == [1.0] * 4
    assert found["routing/jaccard"] == 1.0  # with 4 experts every top-16 set is the full pool
    # Top-1 sets {0}, {0} (tie: lowest id), {1}, {2}; top-2 sets {0,1}, {0,1}, {1,2}, {2,0}.
    assert found["routing/union_size_1"] == 3
    assert found["routing/pool_coverage_1"] == 3 / 4
    assert found["routing/saturation_1"] == 3 / 4
    assert found["routing/token_coverage_1"] == pytest.approx((8 + 2 + 4 + 8) / 32)
    assert found["routing/token_coverage_1_mean"] == pytest.approx((1 + 0.25 + 0.5 + 1) / 4)
    assert found["routing/token_coverage_1_min"] == 0.25
    assert found["routing/token_coverage_1_median"] == 0.75
    assert found["routing/token_coverage_1_max"] == 1.0
    assert found["routing/union_size_2"] == 3
    assert "routing/union_size_5" not in found


def test_jaccard_and_unions_across_pools() -> None:
    counts = np.zeros((4, 20), np.int32)
    counts[:, :16] = 1
    counts[1, :16] = 0
    counts[1, 4:20] = 1
    shared = routing_diagnostics(counts, groups=1)
    # Layers 0, 2, 3 use 0-15 and layer 1 uses 4-19: 12 in common of 20.
    assert shared["routing/jaccard"] == pytest.approx((6 * 1 + 6 * 12 / 20) / 12)
    private = routing_diagnostics(counts, groups=4)
    assert private["routing/jaccard"] == 0.0
    assert private["routing/union_size_16"] == 64
    assert private["routing/pool_coverage_16"] == 64 / 80
    assert routing_diagnostics(counts[:1], groups=1)["routing/jaccard"] is None


def lines(folder: Path) -> list[dict]:
    """The metrics without the time of day, which every line has."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [datetime.datetime.fromisoformat(line.pop("time")) for line in found if "time" in line]
    assert all(abs((datetime.datetime.now(datetime.UTC) - time).total_seconds()) < 600 for time in times)
    return found


def test_metrics_are_json_lines_and_events(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, tensorboard=True)
    writer.write("train", 1, {"loss/lm": np.float32(2.5), "load/layer": np.array([1.0, 2.0]), "mfu": None})
    writer.write("valid", 1, {"loss": math.nan})
    writer.sync()
    writer.close()
    assert lines(tmp_path) == [
        {"kind": "train", "step": 1, "loss/lm": 2.5, "load/layer": [1.0, 2.0], "mfu": None},
        {"kind": "valid", "step": 1, "loss": None},
    ]
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    # What there is of each layer has a curve for each.
    assert all(tag in events for tag in (b"train/loss/lm", b"train/load/layer/00", b"train/load/layer/01"))


def test_resume_drops_later_and_torn_lines(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    for step in (10, 20, 30):
        writer.write("train", step, {"loss/lm": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "step": 1')
    writer = MetricsWriter(tmp_path, 20, tensorboard=False)
    writer.write("train", 21, {"loss/lm": 0.0})
    writer.close()
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 21]
    MetricsWriter(tmp_path, 0, tensorboard=False).close()
    assert lines(tmp_path) == []


def test_a_resumed_writer_knows_what_was_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    assert (writer.intervals, writer.kinds) == ([], {})
    writer.write("train", 10, {"tokens_per_second": None, "seconds": None})
    writer.write("train", 20, {"tokens_per_second": 5.0, "seconds": 2})
    writer.write("skipped", 20, {})
    writer.write("train", 30, {"tokens_per_second": 7.0, "seconds": 3.0})
    writer.close()
    writer = MetricsWriter(tmp_path, 20, tensorboard=False)
    writer.write("valid", 25, {"tokens_per_second": 9.0})
    writer.close()
    assert writer.intervals == [(5.0, 2.0)]
    assert writer.kinds == {"train": 2, "skipped": 1, "valid": 1}


def test_a_complete_line_without_its_newline_is_torn_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}')
    writer = MetricsWriter(tmp_path, 5, tensorboard=False)
    writer.write("train", 6, {})
    writer.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 6]


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e9) == math.inf
    assert math.isnan(perplexity(math.nan))  # of a skipped step: no figure is better than a wrong one


def test_flops_of_the_published_182m_model() -> None:
    # Weights in matrix products: attention 18,874,368, one expert per layer 12 * 3 * 768 * 3072, head 51200 * 768.
    weights = 18_874_368 + 12 * 3 * 768 * 3072 + 51200 * 768
    scores = 12 * 768 * 1024
    dense = Config(moe=MoEConfig(router="none", experts_per_layer=1), pool=PoolConfig(groups=12))
    assert flops_per_token(dense) == 6 * weights + 6 * scores
    assert flops_per_token(Config()) == 6 * (weights + 12 * 96 * 768) + 6 * scores
    two = flops_per_token(Config(moe=MoEConfig(top_k=2))) - flops_per_token(Config())
    assert two == 6 * 12 * 3 * 768 * 3072
    assert flops_per_token(Config(model=ModelConfig(remat="none"))) == flops_per_token(Config())


def test_a_window_counts_the_scores_that_its_mask_keeps() -> None:
    """Of 1024 positions the first 256 see half of 256 on average, the others 256: 256 (768 + 128) scores."""
    of_window = Config(attention=AttentionConfig(kind="window", window=256))
    full_scores, scores = 1024 * 512, 256 * (768 + 128)
    fewer = 12 * 768 * 12 * (full_scores - scores) / 1024
    assert flops_per_token(Config()) - flops_per_token(of_window) == fewer
    alternating = Config(attention=AttentionConfig(kind="alternating", window=256, full_layers=3))
    assert flops_per_token(Config()) - flops_per_token(alternating) == fewer * 8 / 12


def test_utilization_counts_all_devices() -> None:
    """The published 182M dense model, 100,000 tokens per second on eight v5e chips of 197 TFLOP/s."""
    config = Config(moe=MoEConfig(router="none", experts_per_layer=1), pool=PoolConfig(groups=12))
    flops = 6 * (18_874_368 + 12 * 3 * 768 * 3072 + 51200 * 768) + 6 * 12 * 768 * 1024
    assert utilization(config, 1e5, "TPU v5 lite", 8) == pytest.approx(flops * 1e5 / (8 * 197e12))
    assert utilization(config, None, "TPU v5 lite", 8) is None
    assert utilization(config, 1e5, "cpu", 8) is None


def test_heads_that_share_keys_have_fewer_weights() -> None:
    """Width 768 in 12 heads of 64: keys and values of 4 heads save 2 x 2/3 x 768 x 768 weights a layer."""
    whole, shared = (Config(model=ModelConfig(num_kv_heads=heads)) for heads in (12, 4))
    assert flops_per_token(whole) - flops_per_token(shared) == 6 * 12 * 2 * 768 * (768 - 4 * 64)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 2307e12 / 2),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("cpu", None),
        ("TPU v9", None),
    ],
)
def test_peaks_are_known_by_device_kind(kind: str, peak: float | None) -> None:
    assert peak_flops(kind) == peak


@pytest.mark.parametrize("damage", ['{"kind": "train", "step": "2"}', '{"kind": "valid", "step": [2]}', "nonsense", ""])
def test_a_damaged_line_is_not_lost_in_silence(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [f'{{"kind": "train", "step": {step}}}' for step in (1, 2, 3)]
    path.write_text("\n".join([good[0], damage, good[2]]) + "\n")
    for read in (lambda: MetricsWriter(tmp_path, 3, tensorboard=False), lambda: read_history(tmp_path)):
        with pytest.raises(FileError, match=r"metrics\.jsonl line 2: .*; correct or delete that line"):
            read()
    # Behind the lines of the checkpoint it is what a crash left.
    MetricsWriter(tmp_path, 2, tensorboard=False).close()
    assert path.read_text() == good[0] + "\n"


def test_a_full_disk_is_said_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    writer._stream.close()
    writer._stream = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115 - the writer closes it
    for write in (lambda: writer.write("train", 1, {}), writer.close):
        with pytest.raises(FileError, match=r"metrics\.jsonl: cannot be written: No space left on device; make room"):
            write()


def test_a_full_disk_ends_a_run_that_writes_events(tmp_path: Path) -> None:
    """A thread that died of it would leave the run waiting for ever."""
    events = Events(tmp_path, 1)
    events._file._py_recordio_writer._writer.close()
    events._file._py_recordio_writer._writer = Path("/dev/full").open("wb")  # noqa: SIM115 - the writer closes it
    events.add_scalar("train/loss", 1.0, 1)
    with pytest.raises(FileError, match="cannot be written: No space left on device; make room"):
        events.flush()
