"""The tables in `results/*/README.md` against the files beside them, and no claim without an interval."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks import aptitude_study, growth_study, norm_study, retrieval_study, switch_study, trig_study
from benchmarks.intervals import difference_cells, differences_table, main, stored_losses
from benchmarks.overlap import table as overlap_table
from benchmarks.planner_check.report import table as planner_table
from benchmarks.pruning_study import report as pruning_study
from benchmarks.sharing_study.report import finished_runs, tables
from unipool_jax.config.files import read_json

RESULTS = Path(__file__).resolve().parents[1] / "results"
LOCK, ABLATIONS, METHODS = (RESULTS / name for name in ("lock_demo", "ablations_demo", "demo_methods"))
SHARING, SWITCH = RESULTS / "sharing_study", RESULTS / "switch_attention"
RETRIEVAL, APTITUDE = RESULTS / "retrieval", RESULTS / "aptitude"


def rows_of(folder: Path, first: str) -> dict[str, list[str]]:
    """Rows of the table in the folder's README whose head starts with these cells, by their first word."""
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[name.split()[0].rstrip(":")] = cells
    return rows


def summary_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return found


def test_lock_tables() -> None:
    losses = stored_losses(LOCK)
    assert {name: sorted(by_seed) for name, by_seed in losses.items()} == {
        name: [1, 2, 3] for name in ("random_from_start", "unipool", "unipool_lock", "vanilla")
    }
    for name, (valid, test) in rows_of(LOCK, "| run | valid loss").items():
        summaries = [summary_of(LOCK / f"{name}-seed{seed}")["results"] for seed in (1, 2, 3)]
        assert valid == f"{statistics.fmean(s['valid']['loss'] for s in summaries):.4f}"
        assert test == f"{statistics.fmean(s['test']['loss'] for s in summaries):.4f}"
    text = (LOCK / "README.md").read_text(encoding="utf-8")
    for line in differences_table(losses).splitlines()[2:]:
        assert line in text


def test_lock_coverage_is_as_said() -> None:
    """In a freeze no run has every layer at 0.95; two layers of seed 3 have it, and two of each seed at the lock."""
    above, ranges = {50: [0, 0, 0], 100: [0, 0, 0]}, []
    for seed in (1, 2, 3):
        for line in (LOCK / f"unipool_lock-seed{seed}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            if values["kind"] == "valid" and values["step"] in above:
                coverage = values["lock/layer_coverage"]
                above[values["step"]][seed - 1] = sum(value >= 0.95 for value in coverage)
                assert values["lock/assignment"] == "best_effort"
                if values["step"] == 50:
                    ranges.append(f"{min(coverage):.2f} to {max(coverage):.2f}")
    assert above == {50: [0, 0, 2], 100: [2, 2, 2]}
    text = (LOCK / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    for words in ranges:
        assert words in text


def test_ablation_tables() -> None:
    losses = stored_losses(ABLATIONS / "rows")
    rows = rows_of(ABLATIONS, "| row | valid loss")
    assert list(rows) == list(losses)
    for name, (valid, *difference, _) in rows.items():
        assert valid == f"{statistics.fmean(losses[name].values()):.4f}"
        assert difference == (["-"] * 3 if name == "vanilla" else difference_cells(losses, name, "vanilla")[:3])
    losses = stored_losses(ABLATIONS / "runs")
    controls = rows_of(ABLATIONS, "| run | experts")
    assert sorted(controls) == sorted(losses)
    for name, (experts, valid, *difference, load) in controls.items():
        summaries = [summary_of(ABLATIONS / "runs" / f"{name}-seed{seed}") for seed in (1, 2)]
        assert experts == str(summaries[0]["experts_total"])
        assert valid == f"{statistics.fmean(losses[name].values()):.4f}"
        assert difference == (["-"] * 3 if name == "unipool" else difference_cells(losses, name, "unipool")[:3])
        assert load == f"{statistics.fmean(s['busiest_over_mean'] for s in summaries):.1f}"


def test_the_table_of_methods() -> None:
    rows = rows_of(METHODS, "| run | valid loss")
    assert len(rows) == 10
    for name, cells in rows.items():
        summary = summary_of(METHODS / name)
        valid, test = summary["results"]["valid"], summary["results"]["test"]
        expected = [f"{valid['loss']:.4f}", f"{test['loss']:.4f}", f"{valid['bits_per_byte']:.4f}"]
        expected += [f"{summary['experts_used']} of {summary['experts_total']}", f"{summary['busiest_over_mean']:.2f}"]
        assert cells[:5] == expected


def test_the_front_page_quotes_the_interval() -> None:
    losses = stored_losses(LOCK)
    _, interval, _, reading = difference_cells(losses, "vanilla", "unipool")
    assert reading == "shown"
    low, high = (float(end) for end in interval.split(" to "))
    page = " ".join((RESULTS.parent / "docs" / "index.md").read_text(encoding="utf-8").split())
    assert f"{low:.3f} to {high:.3f}" in page


def test_intervals_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {"a": {"1": 2.0, "2": 3.0}, "b": {"1": 2.5}, "c": {"3": 1.0}}
    groups = [
        {"runs": {seed: f"runs/{name}-seed{seed}" for seed in by_seed}, "valid_loss_by_seed": by_seed}
        for name, by_seed in losses.items()
    ]
    (tmp_path / "compare.json").write_text(json.dumps({"groups": groups}))
    monkeypatch.setattr("sys.argv", ["intervals", str(tmp_path), "--minus", "a"])
    assert main() == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| b | a | +0.5000 | - | - | not shown: 1 of at least 3 pairs |",
        "| c | a | - | - | - | not shown: no seed in common |",
    ]
    monkeypatch.setattr("sys.argv", ["intervals", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="give the folder of a study"):
        main()


def test_overlap_table() -> None:
    """The table of compiled schedules is that of the files."""
    text = (RESULTS / "overlap" / "README.md").read_text()
    assert overlap_table(RESULTS / "overlap") in text
    assert overlap_table(RESULTS / "overlap" / "stacks") in text
    assert overlap_table(RESULTS / "overlap" / "before") in text


def test_sharing_study_tables() -> None:
    """The page holds the tables of the runs that are there."""
    text = (SHARING / "README.md").read_text(encoding="utf-8")
    for found in tables(finished_runs(SHARING / "runs")):
        assert found.strip() in text


def test_switch_study_tables() -> None:
    """The page holds the tables of the runs that are there: every arm with three seeds."""
    text = (SWITCH / "README.md").read_text(encoding="utf-8")
    runs = json.loads((SWITCH / switch_study.RUNS).read_text(encoding="utf-8"))["runs"]
    seeds = {arm: [run["seed"] for run in runs if run["arm"] == arm] for arm in ("parent", *switch_study.ARMS)}
    assert all(sorted(found) == list(switch_study.SEEDS) for found in seeds.values())
    for found in switch_study.tables(runs):
        assert found.strip() in text


def test_norm_study_table() -> None:
    folder = RESULTS / "norm_study"
    assert norm_study.report(folder) in (folder / "README.md").read_text(encoding="utf-8")


def test_growth_study_table() -> None:
    folder = RESULTS / "growth_study"
    assert growth_study.table(growth_study.stored(folder)) in (folder / "README.md").read_text(encoding="utf-8")


def test_pruning_study_tables() -> None:
    folder = RESULTS / "pruning_study"
    text = (folder / "README.md").read_text(encoding="utf-8")
    start, end = pruning_study.right_after(folder), stored_losses(folder / "runs")
    pools = pruning_study.pool_table(start, pruning_study.right_after(folder, "source"))
    for found in (pruning_study.recovery_table(start, end), pruning_study.differences_table(end), pools):
        assert found in text


def test_trig_study_tables() -> None:
    folder = RESULTS / "trig_rewrite"
    text = (folder / "README.md").read_text(encoding="utf-8")
    for found in trig_study.tables(trig_study.stored(folder)):
        assert found in text


@pytest.mark.slow
def test_planner_check_table() -> None:
    """What the planner of today says of the steps that were measured."""
    folder = RESULTS / "planner_check"
    measured = {found["case"]: found for found in json.loads((folder / "measured.json").read_text(encoding="utf-8"))}
    assert planner_table(measured) in (folder / "README.md").read_text(encoding="utf-8")


def test_retrieval_study_tables() -> None:
    """The page holds the tables of the runs that are there: every model with three seeds."""
    text = (RETRIEVAL / "README.md").read_text(encoding="utf-8")
    runs = retrieval_study.stored(RETRIEVAL)
    assert {method: sorted(by_seed) for method, by_seed in runs.items()} == {
        method: [1, 2, 3] for method in retrieval_study.METHODS
    }
    for found in retrieval_study.tables(runs, read_json(RETRIEVAL / retrieval_study.BASELINES)):
        assert found.strip() in text


def test_aptitude_study_tables() -> None:
    """The page holds the tables of the arms that are there, each with three seeds."""
    text = (APTITUDE / "README.md").read_text(encoding="utf-8")
    runs = aptitude_study.stored(APTITUDE)
    assert {arm: sorted(by_seed) for arm, by_seed in runs.items()} == {
        arm: [1, 2, 3] for arm in ("base", *aptitude_study.ARMS)
    }
    for found in aptitude_study.tables(runs):
        assert found.strip() in text
