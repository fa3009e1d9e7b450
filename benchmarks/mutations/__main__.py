"""Put one fault at a time into a copy of the package, and see whether the tests notice.

    python -m benchmarks.mutations                                         thirty faults a room, in build/mutations
    python -m benchmarks.mutations --rooms data moe --count 100 --seed 2   others
    python -m benchmarks.mutations --again                                 the survivors once more, with today's tests
    python -m benchmarks.mutations --table                                 the results so far, as Markdown

A fault is a comparison moved by one, + for -, * for /, a number one larger, `and` for `or`, a `not` dropped, `None`
returned, a statement deleted; `sites.py` finds the places, and the seed draws lines of the room, and one fault of each.
First every test file runs once, which says which functions each test calls. A fault then meets the tests that call
its function, cheapest first, until one fails or `--budget` seconds of tests have passed. Results are appended to a file
as they come, and what is there is not repeated, so the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.mutations.sites import Mutation, find

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("moe", "training", "evaluation", "planner", "data")
SKIPPED = ("notebooks", "wheel", "docs", "documented_commands", "project_files", "launch", "layers", "results")
"""Test files that say nothing about what the code computes."""
SLOW = ("mesh", "mesh_runs", "pallas_gpu", "pallas_tpu", "processes", "pytorch_parity", "real_tasks")
"""Test files of minutes: eight devices, compilers of others, another framework, several processes."""
SURVIVED, UNCOVERED = "survived", "uncovered"

Calls = dict[str, dict[str, Any]]


def draw(room: str, count: int, seed: int) -> list[Mutation]:
    """`count` faults of a room: lines drawn without repetition, and one fault of each."""
    by_line: defaultdict[tuple[str, int], list[Mutation]] = defaultdict(list)
    for path in sorted((ROOT / "unipool_jax" / room).glob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        for mutation in find(file, path.read_bytes()):
            by_line[file, mutation.line].append(mutation)
    chance = random.Random(f"{room} {seed}")
    lines = chance.sample(sorted(by_line), min(count, len(by_line)))
    return [chance.choice(by_line[line]) for line in lines]


def copy_tree(target: Path) -> None:
    """The files that git knows, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (source := ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / name)


def pytest(tree: Path, arguments: Sequence[str], limit: float, **environment: str) -> tuple[int | None, str]:
    """Exit code of pytest in `tree`, None past `limit` seconds, and the end of what it printed."""
    # A cached module would hide a fault of the same length in the same second.
    variables = os.environ | environment | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", *arguments]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=tree, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Its children too, such as the processes of a distributed test.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read()[-2000:]


def calls_of_tests(tree: Path, folder: Path, limit: float) -> Calls:
    """What each test calls; of test files that changed since the last time, or are new, by running them."""
    folder.mkdir(parents=True, exist_ok=True)
    found: Calls = {}
    for path in sorted((tree / "tests").glob("test_*.py")):
        name = path.stem.removeprefix("test_")
        if name in SKIPPED + SLOW:
            continue
        kept = folder / f"{name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}.json"
        if not kept.exists():
            before, part = time.monotonic(), kept.with_suffix(".part")
            arguments = ["-p", "benchmarks.mutations.coverage", f"tests/{path.name}"]
            code, _ = pytest(tree, arguments, limit, UNIPOOL_CALLS=str(part.resolve()))
            seconds = time.monotonic() - before
            if part.exists():
                part.replace(kept)
            else:
                kept.write_text("{}", encoding="utf-8")
            print(f"{path.name}: exit code {code}, {seconds:.0f} s", flush=True)
        found |= json.loads(kept.read_text(encoding="utf-8"))
    return found


def chosen_tests(mutation: Mutation, calls: Calls, budget: float) -> tuple[list[str], int]:
    """The tests that call the function, cheapest first, within the budget; and how many did not fit.

    What stands outside of functions is met by every test that calls anything in the file.
    """
    wanted = f"{mutation.file}::{mutation.function}"

    def covers(functions: list[str]) -> bool:
        return any(name.startswith(wanted) if not mutation.function else name == wanted for name in functions)

    tests = sorted((value["seconds"], test) for test, value in calls.items() if covers(value["functions"]))
    taken = 0.0
    chosen: list[str] = []
    for seconds, test in tests:
        if chosen and taken + seconds > budget:
            break
        taken += seconds
        chosen.append(test)
    return chosen, len(tests) - len(chosen)


def attempt(mutation: Mutation, tree: Path, calls: Calls, budget: float) -> dict[str, Any]:
    """Put the fault in, run its tests, take it out."""
    tests, left_out = chosen_tests(mutation, calls, budget)
    result = dataclasses.asdict(mutation) | {"tests": len(tests), "left_out": left_out, "killer": None}
    if not tests:
        return result | {"outcome": UNCOVERED, "seconds": 0.0}
    path = tree / mutation.file
    source = path.read_bytes()
    limit = 60 + 6 * sum(calls[test]["seconds"] for test in tests)
    before = time.monotonic()
    try:
        path.write_bytes(mutation.apply(source))
        code, output = pytest(tree, ["-x", "-q", "--no-header", *tests], limit)
    finally:
        path.write_bytes(source)
    seconds = round(time.monotonic() - before, 1)
    killer = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    outcome = SURVIVED if code == 0 else "timeout" if code is None else "killed"
    return result | {"outcome": outcome, "seconds": seconds, "killer": killer[-1][:200] if killer else None}


def present(record: dict[str, Any]) -> Mutation | None:
    """A recorded fault in the source as it is now; None if its code is gone."""
    names = [field.name for field in dataclasses.fields(Mutation)]
    recorded = Mutation(**{name: record[name] for name in names})
    path = ROOT / recorded.file
    if not path.exists():
        return None
    same = [m for m in find(recorded.file, path.read_bytes()) if m.identity == recorded.identity]
    return min(same, key=lambda m: abs(m.line - recorded.line), default=None)


def read(path: Path) -> list[dict[str, Any]]:
    """The recorded results."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(records: Sequence[dict[str, Any]]) -> str:
    """Counts by room, and every survivor with its line."""
    rooms: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        rooms[record["file"].split("/")[1]][record["outcome"]] += 1
    lines = ["| room | faults | noticed | survived | no test calls it |", "|---|---|---|---|---|"]
    for room, counts in rooms.items():
        noticed = counts["killed"] + counts["timeout"]
        lines.append(f"| {room} | {counts.total()} | {noticed} | {counts[SURVIVED]} | {counts[UNCOVERED]} |")
    lines.append("")
    for record in records:
        if record["outcome"] in (SURVIVED, UNCOVERED):
            before, after = (" ".join(record[key].split()) for key in ("before", "after"))
            left = f", {record['left_out']} tests left out" if record["left_out"] else ""
            lines.append(f"- `{record['file']}:{record['line']}` `{before}` -> `{after}` ({record['outcome']}{left})")
    return "\n".join(lines)


def main() -> int:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=list(ROOMS))
    parser.add_argument("--count", type=int, default=30, help="faults a room")
    parser.add_argument("--seed", type=int, default=1, help="draws the lines")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests that a fault meets")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds of a test file in the first run")
    parser.add_argument("--out", type=Path, default=Path("build/mutations"), help="folder of results")
    parser.add_argument("--again", action="store_true", help="try the survivors again, with the tests of now")
    parser.add_argument("--table", action="store_true", help="print the results and stop")
    options = parser.parse_args()
    first, again = options.out / "results.jsonl", options.out / "again.jsonl"
    records = read(first)
    if options.table:
        print(table(read(again) if options.again else records))
        return 0
    if options.again:
        survivors = [record for record in records if record["outcome"] in (SURVIVED, UNCOVERED)]
        mutations, results = [m for record in survivors if (m := present(record)) is not None], again
        again.unlink(missing_ok=True)
        done = set()
    else:
        drawn = [draw(room, options.count, options.seed) for room in options.rooms]
        # Room by room in turn, so that an interrupted study has some of each.
        mutations = [room[i] for i in range(max(map(len, drawn))) for room in drawn if i < len(room)]
        done, results = {(record["file"], record["start"], record["after"]) for record in records}, first
    os.nice(max(0, 10 - os.nice(0)))
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        tree = Path(scratch)
        copy_tree(tree)
        calls = calls_of_tests(tree, options.out / "calls", options.limit)
        for number, mutation in enumerate(mutations, 1):
            if (mutation.file, mutation.start, mutation.after) in done:
                continue
            record = attempt(mutation, tree, calls, options.budget)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            place = f"{mutation.file}:{mutation.line}"
            print(f"{number} of {len(mutations)} {place} {record['outcome']}, {record['seconds']:.0f} s", flush=True)
    print(table(read(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
