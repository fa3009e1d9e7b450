"""From scores to what is trained on: one line a solution, and a manifest that says how it came about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unipool_jax.aptitude.candidates import FORMATS, Candidate, by_source, fingerprint
from unipool_jax.aptitude.rule import Choice, SourceRule, Variant, check_rules, choose
from unipool_jax.aptitude.scores import Score
from unipool_jax.config.errors import UserError
from unipool_jax.config.files import write_json, write_text
from unipool_jax.data.store_format import file_sha256, json_sha256

MANIFEST = ".manifest.json"
"""What the name of a manifest has after that of its file."""


def select(
    candidates: Sequence[Candidate],
    scores: Mapping[str, Score],
    rules: Mapping[str, SourceRule],
    variant: Variant,
    seed: int = 0,
    one_quantile: float = 0.5,
) -> dict[str, tuple[list[Candidate], Choice, np.ndarray]]:
    """The candidates of each source in the order of their ids, what is kept of them, and their differences.

    All solutions of a chosen format are kept, not only the one that was scored.

    Raises:
      UserError: candidates without scores, scores of other candidates or under several models, or rules that do not
        fit the sources.
    """
    places = by_source(candidates)
    check_rules(rules, places)
    known = {one.id for one in candidates}
    if variant in ("tata", "one_format", "random") and (missing := sorted(known - scores.keys())):
        raise UserError(
            f"scores: {len(missing)} candidates have none, the first {missing[0]}; score them, or give variant=both"
        )
    if strange := sorted(scores.keys() - known):
        raise UserError(f"scores: {strange[0]} is no candidate; give the file that was scored")
    if len({one.under for one in scores.values()}) > 1:
        raise UserError("scores: not all of one model, seed, set of anchors and way; give files of one scoring")
    found = {}
    for source, members in places.items():
        chosen = [candidates[place] for place in members]
        difference_N = np.array([scores[one.id].difference if one.id in scores else np.nan for one in chosen])
        kept = choose(variant, rules[source], difference_N, int(json_sha256([seed, source]), 16), one_quantile)
        found[source] = (chosen, kept, difference_N)
    return found


def training_lines(selected: Mapping[str, tuple[list[Candidate], Choice, np.ndarray]]) -> list[str]:
    """A JSON object for each solution, in the order of sources, ids and formats."""
    lines = []
    for source, (chosen, kept, _) in selected.items():
        for candidate, cot, tir in zip(chosen, kept.cot_N, kept.tir_N, strict=True):
            for kind, keep in zip(FORMATS, (cot, tir), strict=True):
                for solution in (candidate.cot if kind == "cot" else candidate.tir) if keep else ():
                    line = {"id": candidate.id, "source": source, "format": kind}
                    lines.append(json.dumps(line | {"prompt": candidate.question, "response": solution}))
    return lines


def counts_of(selected: Mapping[str, tuple[list[Candidate], Choice, np.ndarray]], scores: Mapping[str, Score]) -> Any:
    """What the manifest says of each source."""
    found = {}
    for source, (chosen, kept, difference_N) in selected.items():
        solutions_N = np.array([len(one.cot) for one in chosen])
        errors_N = np.array([_error(scores.get(one.id)) for one in chosen])
        # Whether the other side of the threshold is within two standard errors.
        near_N = np.abs(difference_N - (np.nan if kept.threshold is None else kept.threshold)) <= 2 * errors_N
        found[source] = {
            "questions": len(chosen),
            "unscored": int((~np.isfinite(difference_N)).sum()),
            "threshold": kept.threshold,
            "at_threshold": int((difference_N == kept.threshold).sum()) if kept.threshold is not None else 0,
            "undecided": int(near_N.sum()),
            "questions_cot": int(kept.cot_N.sum()),
            "questions_tir": int(kept.tir_N.sum()),
            "questions_both": int((kept.cot_N & kept.tir_N).sum()),
            "solutions_cot": int(solutions_N[kept.cot_N].sum()),
            "solutions_tir": int(solutions_N[kept.tir_N].sum()),
        }
    return found


def _error(score: Score | None) -> float:
    return np.nan if score is None or score.error is None else score.error


def write_selection(
    out: Path,
    candidates: Sequence[Candidate],
    scores: Mapping[str, Score],
    rules: Mapping[str, SourceRule],
    settings: Mapping[str, Any],
    selected: Mapping[str, tuple[list[Candidate], Choice, np.ndarray]],
) -> dict[str, Any]:
    """Write the solutions and, beside them, the manifest, which is returned; raises FileError."""
    write_text(out, "".join(f"{line}\n" for line in training_lines(selected)))
    manifest = {
        "candidates_sha256": fingerprint(candidates),
        "scores_sha256": json_sha256([scores[name].as_json() for name in sorted(scores)]),
        "scored_under": next((one.under for one in scores.values()), None),
        "selection_sha256": file_sha256(out),
        "settings": dict(settings),
        "rules": {source: {"default": rule.default, "quantile": rule.quantile} for source, rule in rules.items()},
        "sources": counts_of(selected, scores),
    }
    write_json(out.with_name(out.name + MANIFEST), manifest, indent=1)
    return manifest
