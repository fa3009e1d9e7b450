"""Predictions beside measurements, as tables in Markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.planner_check.cases import CALIBRATION, config_of
from benchmarks.planner_check.fit import Machine, Quality, calibrate, proportional, quality
from benchmarks.planner_check.predict import predicted_bytes, predicted_seconds, step_of
from unipool_jax.training.flops import flops_per_token


def table(measured: dict[str, dict[str, Any]]) -> str:
    """The tables of measured cases by name: constants, scores, and every held-out case.

    Each value is a `measure.Measured` as JSON has it. The constants come from the calibration's cases alone.
    """
    held_out = [case for case in measured if case not in CALIBRATION]
    truth = {case: min(found["seconds"]) for case, found in measured.items()}
    machine = calibrate(
        [step_of(config_of(case), measured[case]["launches"]) for case in CALIBRATION],
        [truth[case] for case in CALIBRATION],
    )
    per_flop = proportional([_flops(case) for case in CALIBRATION], [truth[case] for case in CALIBRATION])
    predicted = [predicted_seconds(config_of(case), machine, measured[case]["launches"]) for case in held_out]
    seconds, flops = [truth[case] for case in held_out], [per_flop * _flops(case) for case in held_out]
    memory = [sum(predicted_bytes(config_of(case))) for case in held_out]
    needed = [measured[case]["state_bytes"] + measured[case]["temporary_bytes"] for case in held_out]
    lines = [
        _constants(machine),
        "",
        f"| {len(held_out)} held-out cases | mean error | worst error | rank correlation |",
        "|---|---|---|---|",
        _score("step time, planner", quality(predicted, seconds)),
        _score("step time, FLOPs only", quality(flops, seconds)),
        _score("memory, planner", quality(memory, needed)),
        "",
        "| held-out case | measured ms | planner | error | FLOPs only | error | compiled MB | planner | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, *row in zip(held_out, seconds, predicted, flops, needed, memory, strict=True):
        took, planned, by_flops, used, expected = row
        lines.append(
            f"| {case} | {took * 1e3:.1f} | {planned * 1e3:.1f} | {planned / took - 1:+.1%} | {by_flops * 1e3:.1f} | "
            f"{by_flops / took - 1:+.1%} | {used / 1e6:.1f} | {expected / 1e6:.1f} | {expected / used - 1:+.1%} |"
        )
    return "\n".join(lines)


def _flops(case: str) -> float:
    """Model FLOPs of a step, nothing recomputed or padded."""
    config = config_of(case)
    return flops_per_token(config) * config.tokens_per_step


def _constants(machine: Machine) -> str:
    return (
        f"Fitted to {len(CALIBRATION)} cases: {machine.peak / 1e9:.1f} GFLOP/s, {machine.bandwidth / 1e9:.2f} GB/s, "
        f"{machine.launch * 1e6:.2f} microseconds a launch."
    )


def _score(name: str, found: Quality) -> str:
    return f"| {name} | {found.mean_error:.1%} | {found.worst_error:.1%} | {found.rank_correlation:.3f} |"
