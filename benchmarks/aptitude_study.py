"""Is it worth choosing by a model's aptitude which problems it learns as text, as programs, or both? Five arms, paired.

    python -m benchmarks.aptitude_study                   # what is missing
    python -m benchmarks.aptitude_study --report          # the tables of what is there
    python -m benchmarks.aptitude_study --out /tmp/try --work /tmp/try/work --seeds 1 --candidates 12 --tests 4 \\
        --overrides train.steps=4

For a seed a small model is trained on few-shot text of two sources (`benchmarks/aptitude_problems.py`): sums and
orders, answered in text, as programs and bare. It scores candidates by likelihood, and is fine-tuned for the same steps
on what each arm selects: `cot`, `tir`, `both`, `tata` (programs for all sums, text for all orders, and both for a tail
of each by score) and `random`, its control, which doubles as many. Then it answers new problems greedily; programs
that it writes are run. A seed fixes weights, problems and the order of all text.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax

from benchmarks.aptitude_problems import SOURCES, draw, markup, shots
from benchmarks.intervals import Losses, difference_cells, kept_runs, markdown_table, mean_cell
from unipool_jax.analysis.paired import CELLS
from unipool_jax.aptitude.candidates import FORMATS, Candidate
from unipool_jax.aptitude.command import anchors_command, select_command
from unipool_jax.aptitude.expert_use import correlations
from unipool_jax.aptitude.generation import GenerationScorer
from unipool_jax.aptitude.requests import AnchorsRequest, AptitudeScoreRequest, AptitudeSelectRequest
from unipool_jax.aptitude.rule import Variant
from unipool_jax.aptitude.score_command import score_command
from unipool_jax.aptitude.scores import read_scores
from unipool_jax.aptitude.selection import MANIFEST
from unipool_jax.aptitude.tools import answers, final_answer, same_answer
from unipool_jax.cli.guard import guarded
from unipool_jax.config.compose import compose_config
from unipool_jax.config.files import read_json, write_atomically, write_json, write_text
from unipool_jax.data.train_tokenizer import train_tokenizer
from unipool_jax.evaluation.requests import EvalRequest
from unipool_jax.evaluation.tasks_command import open_model
from unipool_jax.training.entry import run
from unipool_jax.training.metrics import plain_json

RESULTS = Path(__file__).resolve().parents[1] / "results" / "aptitude"
WORK = Path("runs/aptitude_study")
ARMS: tuple[Variant, ...] = ("cot", "tir", "both", "random", "tata")
PAIRS = (("tata", "random"), ("tata", "both"), ("tata", "cot"), ("tata", "tir"), ("random", "both"))
RULES = ("sums:tir:0.65", "orders:cot:0.3")
SEEDS, CANDIDATES, TESTS, ANCHORS = 3, 160, 100, 10
"""Candidates, tests and anchors of each source."""
PROBLEMS, DOCUMENTS, VOCABULARY, MAX_TOKENS = 1000, 40_000, 320, 36
"""Of the few-shot text, problems of each source; tokens of a continuation."""
SETTINGS = (
    "scale=demo method=unipool model.num_layers=4 model.hidden_size=64 model.ffn_size=128 data.sequence_length=96 "
    "data.document_mask=true train.batch_size=32 train.microbatch_size=32 train.eval_every=0 train.eval_batches=4 "
    "train.eval_batch_size=32 train.keep_checkpoints=1 loss.switch_group_sequences=32 run.tensorboard=false"
)
BASE = "data=text train.steps=400 train.checkpoint_every=400"
TUNED = "data=conversations train.steps=60 train.checkpoint_every=60 optimizer.learning_rate=1e-3"
PROMPT = "Question: {}\nAnswer: "
TEMPLATE = PROMPT.format("{{ messages[-1].content }}")


class Study:
    """What one seed needs.

    Args:
      seed: of everything.
      arguments: of the command.
    """

    def __init__(self, seed: int, arguments: argparse.Namespace):
        self.seed, self.arguments = seed, arguments
        self.work: Path = arguments.work.resolve() / f"seed{seed}"
        self.tests = draw(seed, arguments.tests)
        self.candidates = draw(seed + 1000, arguments.candidates, without=self.tests)

    def path(self, name: str) -> Path:
        """A file of this seed."""
        return self.work / name

    def train(self, name: str, words: Sequence[str]) -> int:
        """Train a run, if it is not there; returns an exit code."""
        place = [f"run.dir={self.work}", f"run.name={name}", f"data.cache_dir={self.path('cache')}"]
        place += [f"data.tokenizer={self.path('tokenizer.json')}", f"model.vocab_size={VOCABULARY}"]
        settings = [*SETTINGS.split(), *words, *self.arguments.overrides, *place, f"train.seed={self.seed}"]
        return guarded(functools.partial(run, compose_config(settings)))

    def prepare(self) -> int:
        """Text, the base model, anchors and scores; returns an exit code."""
        if not self.path("text.jsonl").exists():
            write_text(self.path("template.jinja"), TEMPLATE)
            lines = "".join(json.dumps(one.as_json()) + "\n" for one in self.candidates)
            write_text(self.path("candidates.jsonl"), lines)
            others = draw(self.seed + 2000, self.arguments.text, without=[*self.tests, *self.candidates])
            documents = shots(others, self.seed, DOCUMENTS)
            write_text(self.path("text.jsonl"), "".join(json.dumps({"text": text}) + "\n" for text in documents))
            write_atomically(self.path("tokenizer.json"), train_tokenizer(markup(), VOCABULARY))
        if code := self.train("base", [*BASE.split(), f"data.files=[{self.path('text.jsonl')}]"]):
            return code
        anchors, candidates = str(self.path("anchors.json")), str(self.path("candidates.jsonl"))
        count = min(ANCHORS, self.arguments.candidates)
        anchors_command(AnchorsRequest(candidates=candidates, out=anchors, count=count, seed=self.seed))
        return score_command(
            AptitudeScoreRequest(
                run=str(self.path("base")), candidates=candidates, anchors=anchors, out=str(self.path("scores.jsonl"))
            )
        )

    def tune(self, arm: Variant) -> int:
        """Select and fine-tune; returns an exit code."""
        chosen = self.path(f"{arm}.jsonl")
        select_command(
            AptitudeSelectRequest(
                candidates=str(self.path("candidates.jsonl")),
                scores=(str(self.path("scores.jsonl")),),
                rules=RULES,
                out=str(chosen),
                variant=arm,
                seed=self.seed,
            )
        )
        start = [f"data.template={self.path('template.jinja')}", f"run.init_from={self.path('base')}"]
        return self.train(arm, [*TUNED.split(), f"data.files=[{chosen}]", *start])

    def answer(self, name: str) -> dict[str, Any]:
        """What a run answers to the tests, by source."""
        model, _ = open_model(EvalRequest(str(self.path(name))))
        complete = GenerationScorer(model, MAX_TOKENS).complete
        found = answers([PROMPT.format(one.question) for one in self.tests], complete)
        return {
            source: _counts(
                [(one, text or "") for one, text in zip(self.tests, found, strict=True) if one.source == source]
            )
            for source in SOURCES
        }

    def scored(self) -> dict[str, Any]:
        """What the scores say, by source."""
        table = read_scores(self.path("scores.jsonl"))
        found = {}
        for source in SOURCES:
            own = [table[one.id] for one in self.candidates if one.source == source]
            rho = {name: None if one is None else one._asdict() for name, one in correlations(own).items()}
            found[source] = {
                "mean_difference": statistics.fmean(one.difference for one in own),
                "spread": statistics.stdev(one.difference for one in own),
                "error": statistics.fmean(one.error or 0.0 for one in own),
                "rank_correlations": rho,
            }
        return found


def _counts(found: Sequence[tuple[Candidate, str]]) -> dict[str, float]:
    """Means over answers."""
    right = [same_answer(final_answer(text), one.answer) for one, text in found]
    run = [len(re.findall("```output", text)) for _, text in found]
    return {
        "right": statistics.fmean(right),
        "programs": statistics.fmean(run),
        "characters": statistics.fmean(len(text) for _, text in found),
    }


def stored(out: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """What was kept of each arm and the base model, by seed."""
    return kept_runs(out, ("base", *ARMS), "arm")


def right(runs: Mapping[str, Mapping[int, dict[str, Any]]], source: str) -> Losses:
    """Share of answers that are right, by arm and seed; of both sources, their mean."""
    chosen = SOURCES if source == "all" else (source,)
    return {
        arm: {seed: statistics.fmean(one["answers"][name]["right"] for name in chosen) for seed, one in by_seed.items()}
        for arm, by_seed in runs.items()
    }


def tables(runs: Mapping[str, Mapping[int, dict[str, Any]]]) -> list[str]:
    """Markdown: what each arm answers, the differences paired by seed, and what the scores say."""
    rows = []
    for arm, by_seed in runs.items():
        shares = [mean_cell(list(right(runs, source)[arm].values())) for source in (*SOURCES, "all")]
        means = [
            statistics.fmean(one["answers"][source][name] for one in by_seed.values() for source in SOURCES)
            for name in ("programs", "characters")
        ]
        solutions = [one["solutions"] for one in by_seed.values() if one["solutions"] is not None]
        rows.append(
            [
                arm,
                str(len(by_seed)),
                f"{statistics.fmean(solutions):.0f}" if solutions else "-",
                *shares,
                *(f"{mean:.3f}" for mean in means),
            ]
        )
    differences = [
        [source, f"{arm} - {minus}", *difference_cells(right(runs, source), arm, minus)]
        for source in ("all", *SOURCES)
        for arm, minus in PAIRS
        if arm in runs and minus in runs
    ]
    head = ("arm", "seeds", "solutions", *SOURCES, "both", "programs run", "characters")
    scored = [
        [source, str(seed), *_scored(one["scores"][source])]
        for source in SOURCES
        for seed, one in runs.get("base", {}).items()
    ]
    columns = ("mean d", "spread of d", "error of d", "use and d", "use and size of d", "length and d")
    return [
        markdown_table(head, rows),
        markdown_table(("source", "difference", *CELLS), differences),
        markdown_table(("source", "seed", *columns), scored),
    ]


def _scored(found: dict[str, Any]) -> list[str]:
    names = ("expert_distance_and_d", "expert_distance_and_size_of_d", "length_difference_and_d")
    known = [found["rank_correlations"][name] for name in names]
    rho = ["-" if one is None else f"{one['rho']:+.2f} ({one['low']:+.2f} to {one['high']:+.2f})" for one in known]
    return [*(f"{found[name]:.3f}" for name in ("mean_difference", "spread", "error")), *rho]


def run_seed(seed: int, arguments: argparse.Namespace) -> int:
    """What is missing of a seed; returns an exit code."""
    files = {arm: arguments.out / f"{arm}-seed{seed}.json" for arm in ("base", *ARMS)}
    missing = [arm for arm, kept in files.items() if not kept.exists()]
    if not missing:
        return 0
    one, start = Study(seed, arguments), time.process_time()
    if code := one.prepare():
        return code
    for arm in missing:
        kept: dict[str, Any] = {"arm": arm, "seed": seed, "solutions": None}
        if arm == "base":
            kept["scores"] = one.scored()
        else:
            if code := one.tune(next(name for name in get_args(Variant) if name == arm)):
                return code
            manifest = read_json(one.path(f"{arm}.jsonl{MANIFEST}"))["sources"]
            kept["solutions"] = sum(found[f"solutions_{kind}"] for found in manifest.values() for kind in FORMATS)
        kept["answers"] = one.answer(arm)
        seconds, start = time.process_time() - start, time.process_time()
        write_json(files[arm], plain_json(kept | {"cpu_seconds": round(seconds)}), indent=1)
        print(f"{arm}, seed {seed}: {kept['answers']}, {seconds:.0f} CPU-seconds", flush=True)
    return 0


def main() -> int:
    """Run what is missing and print the tables; returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of what is kept")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of texts, scores and runs")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds 1 .. N")
    parser.add_argument("--candidates", type=int, default=CANDIDATES, help="of each source")
    parser.add_argument("--tests", type=int, default=TESTS, help="of each source")
    parser.add_argument("--text", type=int, default=PROBLEMS, help="problems of the few-shot text, of each source")
    parser.add_argument(
        "--overrides", nargs="*", default=[], help="settings for all runs, as `unipool train` takes them"
    )
    parser.add_argument("--report", action="store_true", help="print the tables only")
    arguments = parser.parse_args()
    if not arguments.report:
        arguments.out.mkdir(parents=True, exist_ok=True)
        # Arms of all seeds run the same programs.
        jax.config.update("jax_compilation_cache_dir", str((arguments.work / "programs").resolve()))
        for seed in range(1, arguments.seeds + 1):
            if code := run_seed(seed, arguments):
                return code
    print("\n".join(tables(stored(arguments.out))), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
