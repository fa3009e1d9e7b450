"""`unipool compare`: runs side by side, differences paired by seed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from unipool_jax.analysis import figures
from unipool_jax.analysis.compare import (
    LATE,
    Group,
    Row,
    check_slices,
    common_name,
    compare,
    families,
    grouped,
    load_run,
    paired_series,
)
from unipool_jax.analysis.page import Part, Table, write_page
from unipool_jax.analysis.paired import CELLS, FEWEST, Paired
from unipool_jax.analysis.requests import CompareRequest
from unipool_jax.config.files import write_json, write_text
from unipool_jax.config.growth_schedule import grows
from unipool_jax.config.schema import ConfigError
from unipool_jax.config.words import to_words
from unipool_jax.moe.scope import layer_pressure
from unipool_jax.training.metrics import plain_json
from unipool_jax.training.run_folder import CONFIG

RESULTS = "compare.json"
"""In the folder of results, which it tells from the folder of a run."""

_POOL_SIZE = {"pool.experts", "pool.fraction"}
_GRANULARITY = {"moe.experts_per_layer", "moe.top_k", "pool.experts"}


def table_of(rows: Sequence[Row]) -> Table:
    """The groups as text, with a column of tokens without an expert where there are any, and one of training FLOPs
    where a run grows: equal steps are then not equal work."""
    head = ["", "seeds", "valid loss", "test loss", "bits per byte", "experts used", "busiest over mean"]
    any_grows = any(grows(row.group.config) for row in rows)
    zero_gates = [[run.zero_gates for run in row.group.runs.values()] for row in rows]
    any_zero = any(share for shares in zero_gates for share in shares)
    lines = []
    for row, shares in zip(rows, zero_gates, strict=True):
        summaries = [run.summary for run in row.group.runs.values()]
        tests = [s["results"]["test"]["loss"] for s in summaries if "test" in s["results"]]
        bits = [s["results"]["valid"]["bits_per_byte"] for s in summaries]
        used = sorted({f"{s['experts_used']} of {s['experts_total']}" for s in summaries})
        error = "" if row.loss.standard_error is None else f" ± {row.loss.standard_error:.4f}"
        lines.append(
            [
                row.group.name,
                str(len(summaries)),
                f"{row.loss.mean:.4f}{error}",
                f"{np.mean(tests):.4f}" if tests else "-",
                "-" if None in bits else f"{np.mean(bits):.4f}",
                ", ".join(used),
                f"{np.mean([s['busiest_over_mean'] for s in summaries]):.2f}",
                *([_percent([share for share in shares if share is not None])] if any_zero else []),
                *([_flops(summaries)] if any_grows else []),
            ]
        )
    head += (["no expert"] if any_zero else []) + (["FLOPs"] if any_grows else [])
    return Table(head, lines)


def _flops(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Mean training FLOPs; a dash for runs of earlier versions, which do not know them."""
    found = [summary["flops"] for summary in summaries if "flops" in summary]
    return f"{np.mean(found):.3g}" if found else "-"


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * np.mean(shares):.1f}%" if shares else "-"


def differences_of(rows: Sequence[Row]) -> Table:
    """The paired differences as text, with what they show."""
    head = ["", "minus", "of", "pairs", *CELLS]
    lines = []
    for row in rows:
        if row.baseline is not None and row.difference is None:
            lines.append([row.group.name, row.baseline.name, "-", "0", "-", "-", "-", "not shown: no seed in common"])
        for name, value in (("last evaluation", row.difference), ("late training", row.late)):
            if value is None or row.baseline is None:
                continue
            lines.append([row.group.name, row.baseline.name, name, str(value.pairs), *value.cells()])
    return Table(head, lines)


def compare_parts(rows: Sequence[Row], baseline: Group) -> list[Part]:
    """The sections of the page: table, curves, load, and the published sweeps where the runs make one up."""
    groups = [row.group for row in rows]
    words = [
        "Validation loss at the end of training, in nats per token; ± is one standard error over seeds. Load and "
        "experts are those of the last evaluation; no expert: tokens whose gates are all zero, mean over layers."
    ]
    if pressure := _pressures(groups):
        words.append(pressure)
    found = [Part("Results", words, table=table_of(rows))]
    differences = differences_of(rows)
    if differences.rows:
        words = [
            f"Paired with {baseline.config.method_name} of the same scale and granularity: same seed, so same batches, "
            "and same validation text; negative is better. The interval is that of Student's t over seeds. A "
            f"difference is shown by at least {FEWEST} pairs and an interval without 0; whatever is not shown may be "
            "luck. Every row stands alone: of twenty rows without any difference, one is expected to be shown.",
            f"Late training averages over the evaluations of the last {100 - 100 * LATE:.0f}% of the steps, and is "
            "steadier than the last evaluation alone.",
        ]
        found.append(Part("Differences", words, table=differences))
    found += _curves(rows, baseline)
    name = "load/busiest_over_mean"
    loads = {group.name: series for group in groups if (series := group.series("train", name)) is not None}
    if loads:
        text = [
            "Load of the busiest expert over the mean of all experts, in single training batches; 1 is perfect "
            "balance. The mean of an expert that fewer or more layers see than others is what they would give it if "
            "they chose evenly. Read it beside the loss: a method may win because it balances, or in spite of not "
            "balancing."
        ]
        draw = partial(figures.curves_figure, loads, "busiest expert over mean load")
        found.append(Part("Balance over training", text, ("load", draw), "Load of the busiest expert over steps."))
    return found + _sweeps(rows, baseline)


def _pressures(groups: Sequence[Group]) -> str | None:
    """A warning where the pool loss pushes the layers of some groups harder than those of others."""
    found = {group.name: layer_pressure(group.config) for group in groups if group.config.loss.balance == "pool"}
    if not found or max(found.values()) <= 1.01 * min(found.values()):
        return None
    listed = ", ".join(f"{name} {pressure:.2f}" for name, pressure in found.items())
    return (
        f"Of loss.pool_coefficient unequal shares weigh on a layer in these runs ({listed}), so differences may be "
        "those of balance; loss.pressure=layer makes maps of sharing comparable."
    )


def _curves(rows: Sequence[Row], baseline: Group) -> list[Part]:
    """Loss over training: on validation text, or of training batches where evaluations are too few for a curve."""
    groups = [row.group for row in rows]
    label, kind, name = "validation loss", "valid", "loss"
    series = {group.name: group.series(kind, name) for group in groups}
    if any(values is None or len(values.x) < 3 for values in series.values()):
        label, kind, name = "training loss", "train", "loss/lm"
        series = {group.name: group.series(kind, name) for group in groups}
    curves = {group: values for group, values in series.items() if values is not None}
    pairs = {row.group.name: paired_series(row.group, row.baseline, kind, name) for row in rows if row.baseline}
    differences = {group: values for group, values in pairs.items() if values is not None}
    if not curves:
        return []
    text = [f"Above, {label} over training. Below, the paired difference, and its standard error as a band."]
    if kind == "train":
        text.append(
            "Evaluations were too few for a curve. Runs of one seed read the same batches, so these losses pair."
        )
    draw = partial(figures.paired_figure, curves, differences, baseline.config.method_name, label)
    return [Part("Over training", text, ("curves", draw), f"{label} and paired differences over steps.")]


def _sweeps(rows: Sequence[Row], baseline: Group) -> list[Part]:
    found = []
    by_name = {row.group.name: row for row in rows}
    shared = [row.group for row in rows if row.difference is not None and row.group.config.moe.router != "none"]
    sizes = {}
    for members in families(shared, _POOL_SIZE):
        points = []
        for group in members:
            row = by_name[group.name]
            assert row.difference is not None
            assert row.baseline is not None
            difference, share = row.difference, group.config.total_experts / row.baseline.config.total_experts
            points.append((share, difference.mean, difference.standard_error))
        if len(points) > 1:
            sizes[common_name(members)] = points
    if sizes and baseline.config.moe.router != "none":
        text = ["How small may the pool be before its advantage is gone? (arXiv 2605.06665, figure 2a.)"]
        draw = partial(figures.fraction_figure, sizes, baseline.config.method_name)
        found.append(Part("Smaller pools", text, ("pool_fraction", draw), "Loss difference against pool size."))
    grains = {}
    for members in families([row.group for row in rows if row.group.config.moe.router != "none"], _GRANULARITY):
        ticks = [f"{g.config.moe.experts_per_layer}/{g.config.moe.top_k}" for g in members]
        if len(set(ticks)) == len(ticks) > 1:
            losses = [by_name[group.name].loss for group in members]
            grains[common_name(members)] = [(t, v.mean, v.standard_error) for t, v in zip(ticks, losses, strict=True)]
    if grains:
        text = ["More experts, and more of them per token: loss against granularity (arXiv 2605.06665, figure 2b)."]
        draw = partial(figures.granularity_figure, grains)
        found.append(Part("Granularity", text, ("granularity", draw), "Validation loss against granularity."))
    return found


def compare_command(request: CompareRequest) -> int:
    """Compare; writes `compare.json`, `table.md`, figures and `report.html`.

    Raises:
      ConfigError, RunError: with what to do about it.
    """
    runs = [load_run(folder) for folder in _without_results(request.runs)]
    check_slices(runs)
    groups = grouped(runs)
    baseline = _baseline(groups, request.baseline)
    rows = compare(groups, baseline)
    tables = [table for table in (table_of(rows), differences_of(rows)) if table.rows]
    folder = Path(request.out) if request.out else runs[0].folder.parent / "compare"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULTS, _json(rows, baseline), indent=1)
    write_text(folder / "table.md", "\n".join(map(_markdown, tables)))
    title = f"{len(groups)} settings, {len(runs)} runs"
    subtitle = f"Paired with {baseline.name}. Runs: {', '.join(str(run.folder) for run in runs)}"
    found = [row.difference for row in rows if row.difference is not None]
    shown = f"{sum(difference.shown for difference in found)} of {len(found)}"
    facts = {"baseline": baseline.name, "runs": str(len(runs)), "differences shown": shown}
    command = shlex.join(["unipool", "compare", *to_words(request)])
    page = write_page(folder, title, subtitle, facts, compare_parts(rows, baseline), command)
    for table in tables:
        _print(table)
    print(f"report: {page}")
    return 0


def _without_results(folders: Sequence[str]) -> list[str]:
    """The folders without the results of an earlier comparison, files or a folder, which `runs/*` names too.

    Raises:
      ConfigError: fewer than two are left.
    """
    found = []
    for folder in folders:
        path = Path(folder)
        if path.is_file():
            print(f"{folder}: a file and no run, left out")
        elif (path / RESULTS).exists() and not (path / CONFIG).exists():
            print(f"{folder}: results of an earlier comparison, left out")
        else:
            found.append(folder)
    if len(found) < 2:
        raise ConfigError([f"{len(found)} run folder(s) given: a comparison needs two or more"])
    return found


def _baseline(groups: Sequence[Group], wanted: str | None) -> Group:
    """The group named `wanted`; for None the first of method `vanilla`, or the first of all."""
    if wanted is None:
        return next((group for group in groups if group.config.method_name == "vanilla"), groups[0])
    for group in groups:
        if group.name == wanted:
            return group
    names = ", ".join(repr(group.name) for group in groups)
    raise ConfigError([f"baseline={wanted}: no such group of runs; there are {names}"])


def _json(rows: Sequence[Row], baseline: Group) -> dict[str, Any]:
    def plain(value: Paired | None) -> Mapping[str, Any] | None:
        if value is None:
            return None
        interval = None if value.interval is None else list(value.interval)
        return value._asdict() | {"interval": interval, "shown": value.shown, "reading": value.reading}

    document = {
        "baseline": baseline.name,
        "groups": [
            {
                "name": row.group.name,
                "runs": {str(seed): str(run.folder) for seed, run in row.group.runs.items()},
                "valid_loss": row.loss._asdict(),
                "valid_loss_by_seed": {str(seed): run.loss for seed, run in row.group.runs.items()},
                "baseline": row.baseline.name if row.baseline else None,
                "difference": plain(row.difference),
                "late_difference": plain(row.late),
                "pairs": row.difference.pairs if row.difference else 0,
            }
            for row in rows
        ],
    }
    return dict(plain_json(document))


def _markdown(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _print(table: Table) -> None:
    shown = RichTable()
    for number, name in enumerate(table.head):
        shown.add_column(name, justify="right" if number else "left")
    for row in table.rows:
        shown.add_row(*row)
    Console(width=None if Console().is_terminal else 160).print(shown)
