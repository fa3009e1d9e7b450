"""Predicts time and memory of held-out training steps on one core of this machine, then measures them.

    python -m benchmarks.planner_check --out results/planner_check
    python -m benchmarks.planner_check --out results/planner_check --tables    # of what is measured already

Peak, bandwidth and the cost of a launch are fitted to a few configurations and frozen. The planner's cost model then
predicts others, beside a baseline that divides model FLOPs by one fitted speed. Writes `measured.json`, prints tables.
Most of the time is compilation: 38 steps.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from benchmarks.planner_check.cases import CALIBRATION, HELD_OUT


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    path = arguments.out / "measured.json"
    if not arguments.tables:
        # Before JAX starts its threads: one per core that it may use.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        from benchmarks.planner_check.measure import measure

        found = [result._asdict() for result in measure((*CALIBRATION, *HELD_OUT), arguments.rounds)]
        arguments.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    from benchmarks.planner_check.report import table

    print(table({found["case"]: found for found in json.loads(path.read_text(encoding="utf-8"))}))


if __name__ == "__main__":
    main()
