"""The printed plan against plain numbers: a made-up step, of which every figure of the report is known beforehand."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from planned import small
from unipool_jax.cli.main import main
from unipool_jax.config.chips import parse_topology
from unipool_jax.planner import report, work
from unipool_jax.planner.collectives import Collective
from unipool_jax.planner.roofline import Estimate, Part

GIB = 2**30
WORK = (work.Work("a", 3e12, 2e12, 5e9), work.Work("b", 1e12, 1e12, 1e9))
MESSAGES = (
    work.Message("weights", "all-gather", ("fsdp",), 2, 50e6),
    work.Message("gradients", "reduce-scatter", ("fsdp",), 1, 199e6),
    work.Message("crumb", "all-reduce", ("data", "expert"), 4, 0.2e6),
    work.Message("speck", "all-reduce", ("data", "expert"), 1, 0.2e6),
)
PARTS = (
    Part("short", 0.001, "memory"),
    Part("long", 0.007, "matrix unit"),
    Part("all-gather over fsdp", 0.002, "links"),
)


def made_up(compiled: bool) -> report.Plan:
    """A plan of four v5p chips with 1, 2 and 3 GiB of parameters, optimizer state and temporaries."""
    topology = parse_topology("v5p:2x2x1")
    counts = work.Counts(WORK, MESSAGES, 0, 0, 0, 0)
    found = Estimate(PARTS, counts, 1e12, topology.chip.flops, 4096)
    collectives = tuple(
        Collective(m.kind, (f"bf16[{i}]", "f32[2]", "f32[3]"), m.axes, 2, m.times, m.sent_bytes, "op")
        for i, m in enumerate(MESSAGES)
    )
    return report.Plan(
        small("unipool"),
        topology,
        {"data": 1, "fsdp": 2, "expert": 2, "tensor": 1},
        1 * GIB,
        2 * GIB,
        3 * GIB,
        92 * GIB,
        collectives if compiled else None,
        Counter({"second": 6, "first": 4}) if compiled else Counter(),
        found,
        (61.4, 9.6) if compiled else None,
    )


def section(text: str, head: str) -> list[str]:
    """The words of the lines below a heading, up to the next empty line."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(head)) + 1
    return [" ".join(line.split()) for line in lines[first : lines.index("", first) if "" in lines[first:] else None]]


def test_memory_is_added_up_and_compared_with_the_chip() -> None:
    plan = made_up(compiled=False)
    # 95 GB are 88.48 GiB: training has room, and an evaluation has not.
    assert (plan.total_bytes, plan.evaluation_total_bytes, plan.fits) == (6 * GIB, 95 * GIB, False)
    assert section(report.text(plan), "memory per device") == [
        "parameters 1.00 GiB",
        "optimizer state 2.00 GiB",
        "activations and temporaries 3.00 GiB peak, with gathered weights and gradients, which share buffers",
        "training, total 6.00 GiB of 88.48",
        "evaluation, with the state 95.00 GiB of 88.48, DOES NOT FIT; train.eval_batch_size=8",
    ]
    assert plan._replace(evaluation_bytes=1).fits
    assert not plan._replace(evaluation_bytes=1, temporary_bytes=92 * GIB).fits


def test_windows_are_said_with_the_load_of_the_busiest_device() -> None:
    """Windows of 8 of 32 consecutive experts, of which each of eight devices has four."""
    tied = ("pool.starts=runs", "pool.span=1")
    sizes = {"data": 1, "fsdp": 1, "expert": 8, "tensor": 1}
    found = []
    for placement in ("auto", "contiguous"):
        config = small("ring", *tied, f"mesh.expert_placement={placement}")
        lines = report.text(made_up(compiled=False)._replace(config=config, sizes=sizes)).splitlines()
        found += [line for line in lines if line.startswith("windows")]
    said = "windows: layers see 8 of 32 experts; with even routing the busiest device receives"
    assert found[0] == f"{said} 1.00 times the mean (mesh.expert_placement=auto)"
    assert found[1].startswith(f"{said} 4.00 times the mean (mesh.expert_placement=contiguous), more than the 3 that")
    assert "windows" not in report.text(made_up(compiled=False))


def test_collectives_are_listed_by_size_and_the_small_ones_together() -> None:
    text = report.text(made_up(compiled=False))
    assert section(text, "collectives per device") == [
        "reduce-scatter over fsdp 1 times 199.0 MB gradients",
        "all-gather over fsdp 2 times 100.0 MB weights",
        "2 smaller ones 1.0 MB",
        "total 300.0 MB",
    ]
    compiled = section(report.text(made_up(compiled=True)), "collectives per device")
    assert compiled[0] == "reduce-scatter over fsdp 1 times 199.0 MB bf16[1], f32[2], ..."
    assert compiled[2:] == ["2 smaller ones 1.0 MB", "total 300.0 MB"]


def test_times_are_listed_longest_first() -> None:
    text = report.text(made_up(compiled=False))
    assert section(text, "modelled step: 10.0 ms") == [
        "long 7.00 ms matrix unit",
        "all-gather over fsdp 2.00 ms links",
        "short 1.00 ms memory",
    ]
    # 1 TFLOP in 10 ms of 459 TFLOP/s; in 8 ms with the links hidden.
    assert "FLOPs per device: 1.00 T of the model, 4.00 T executed with recomputation and padding" in text
    assert "model FLOPs utilization: 21.8% (27.2% if all collectives overlapped with compute)" in text
    assert "bound by: matrix unit 7 ms, memory 1 ms, links 2 ms" in text


def test_the_head_says_how_it_was_found() -> None:
    counted, compiled = (report.text(made_up(compiled=how)).splitlines() for how in (False, True))
    assert counted[0].endswith(
        "v5p:2x2x1: 4 devices (TPU v5), data 1 x fsdp 2 x expert 2 x tensor 1; counted, not compiled"
    )
    assert compiled[0].endswith("tensor 1; compiled")
    assert counted[1].strip() == "16 x 256 tokens per step in 2 micro-batch(es), remat full"
    assert "kernels: counted only" in counted
    assert "kernels: first x 4, second x 6" in compiled
    assert "  compiled in 61 s, evaluation in 10 s" in compiled
    assert not any("compiled in" in line for line in counted)


def test_the_last_line_has_the_same_numbers() -> None:
    found = json.loads(report.text(made_up(compiled=True)).splitlines()[-1])
    assert found["memory"] == {
        "parameters": GIB,
        "optimiser": 2 * GIB,
        "temporaries": 3 * GIB,
        "total": 6 * GIB,
        "evaluation_temporaries": 92 * GIB,
        "evaluation_total": 95 * GIB,
        "hbm": 95_000_000_000,
        "fits": False,
    }
    assert found["collective_bytes"] == {
        "all-gather fsdp": 100_000_000,
        "reduce-scatter fsdp": 199_000_000,
        "all-reduce data+expert": 1_000_000,
    }
    assert (found["compiled"], found["compile_seconds"], found["kernels"]) == (
        True,
        [61.4, 9.6],
        {"second": 6, "first": 4},
    )
    assert found["flops"] == {"model": 1e12, "executed": 4e12}
    assert found["step_seconds"] == sum(part.seconds for part in PARTS)
    assert found["tokens_per_second"] == 4096 / found["step_seconds"]


@pytest.mark.usefixtures("gpus_are_counted")
def test_a_counted_plan_splits_the_state_into_weights_and_moments() -> None:
    plan = report.make_plan(small("unipool", "mesh.topology=h100:8", "mesh.data=2"))
    assert plan.optimizer_bytes == 2 * plan.parameter_bytes
    assert plan.parameter_bytes == int(plan.estimate.counts.state_bytes / 3)
    assert plan.temporary_bytes == int(plan.estimate.counts.temporary_bytes)
    assert plan.evaluation_bytes == int(plan.estimate.counts.evaluation_bytes)
    assert report.collective_bytes(None, plan) == sum(m.total_bytes for m in plan.estimate.counts.messages)


def test_an_invalid_configuration_is_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "mesh=gpu_8", "scale=182m", "pool.groups=5"]) == 2
    output = capsys.readouterr()
    assert "pool.groups=5: must divide model.num_layers=12" in output.err
    assert "memory per device" not in output.out
