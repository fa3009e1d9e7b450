"""`unipool aptitude anchors` and `aptitude select`."""

from __future__ import annotations

import json
from pathlib import Path

from unipool_jax.aptitude.anchors import anchors_document, choose_anchors, tf_idf
from unipool_jax.aptitude.candidates import check_embeddings, read_candidates
from unipool_jax.aptitude.requests import AnchorsRequest, AptitudeSelectRequest
from unipool_jax.aptitude.rule import SourceRule, parse_rule
from unipool_jax.aptitude.scores import Score, read_scores
from unipool_jax.aptitude.selection import MANIFEST, select, write_selection
from unipool_jax.config.errors import UserError
from unipool_jax.config.files import read_array, write_json
from unipool_jax.data.store_format import file_sha256


def anchors_command(request: AnchorsRequest) -> int:
    """Choose anchors, write them and print how many; raises UserError."""
    candidates = read_candidates(Path(request.candidates))
    questions = [one.question for one in candidates]
    if request.run is not None:
        from unipool_jax.aptitude.run_embedding import embed_questions  # JAX, which the rest does not need

        vectors_ND, embedding = embed_questions(request.run, request.step, questions)
    elif request.embeddings is None:
        vectors_ND, embedding = tf_idf(questions), "tf_idf"
    else:
        path = Path(request.embeddings)
        vectors_ND = check_embeddings(read_array(path, "embed the candidates again"), len(candidates), str(path))
        embedding = file_sha256(path)
    anchors = choose_anchors(candidates, vectors_ND, request.count, request.seed)
    write_json(Path(request.out), anchors_document(candidates, anchors, embedding, request.seed), indent=1)
    for source, found in anchors.items():
        print(f"{source}: {len(found)} anchors of {sum(one.source == source for one in candidates):,} candidates")
    return 0


def read_parts(paths: tuple[str, ...]) -> dict[str, Score]:
    """Scores of several files; raises FileError, and UserError where two have the same question."""
    found: dict[str, Score] = {}
    for path in paths:
        new = read_scores(Path(path))
        if twice := sorted(found.keys() & new.keys()):
            raise UserError(f"scores: {twice[0]} is in {path} and in a file before it; leave one out")
        found |= new
    return found


def select_command(request: AptitudeSelectRequest) -> int:
    """Select, write, print counts and, last, one line of JSON; raises UserError."""
    candidates, scores = read_candidates(Path(request.candidates)), read_parts(request.scores)
    rules: dict[str, SourceRule] = {}
    for word in request.rules:
        source, rule = parse_rule(word)
        if source in rules:
            raise UserError(f"rules: two for the source {source}; give one")
        rules[source] = rule
    selected = select(candidates, scores, rules, request.variant, request.seed, request.quantile)
    settings = {"variant": request.variant, "seed": request.seed, "quantile": request.quantile}
    manifest = write_selection(Path(request.out), candidates, scores, rules, settings, selected)
    for source, counts in manifest["sources"].items():
        print(f"{source}: {counts['questions']:,} questions, {counts['questions_both']:,} in both formats")
        if counts["undecided"]:
            print(f"  {counts['undecided']:,} of them within two standard errors of the threshold")
    print(f"{request.out}{MANIFEST}")
    print(json.dumps({"sources": manifest["sources"]}))
    return 0
