"""`unipool aptitude score`; needs JAX, the other commands do not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from unipool_jax.aptitude.anchors import read_anchors
from unipool_jax.aptitude.candidates import read_candidates
from unipool_jax.aptitude.expert_use import UseObserver, correlations
from unipool_jax.aptitude.generation import GenerationScorer
from unipool_jax.aptitude.likelihood import LikelihoodScorer, model_fingerprint
from unipool_jax.aptitude.requests import AptitudeScoreRequest
from unipool_jax.aptitude.scores import Scorer, append_scores, read_scores
from unipool_jax.data.store_format import json_sha256
from unipool_jax.evaluation.requests import EvalRequest
from unipool_jax.evaluation.tasks_command import open_model


def score_command(request: AptitudeScoreRequest) -> int:
    """Score what a file does not have yet, print means and, last, one line of JSON.

    Raises:
      UserError: of a file, a run, or scores of something else.
    """
    candidates = sorted(read_candidates(Path(request.candidates)), key=lambda one: one.id)
    chosen = candidates[request.part :: request.parts]
    anchors = read_anchors(Path(request.anchors))["anchors"]
    model, title = open_model(EvalRequest(request.run, step=request.step))
    scorer: Scorer
    if request.by == "generation":
        scorer, how = GenerationScorer(model, request.max_tokens), f"generation {request.max_tokens}"
    else:
        scorer, how = LikelihoodScorer(model), "likelihood"
    under = json_sha256([how, model_fingerprint(model), anchors, request.seed])[:16]
    print(title)
    out = Path(request.out)
    observer = None if model.config.moe.router == "none" else UseObserver(model)
    scoring = append_scores(out, chosen, anchors, scorer, request.seed, under, observer)
    new = sum(1 for _ in tqdm(scoring, desc="scoring", unit=" questions", disable=None))
    table = read_scores(out) if chosen else {}
    print(f"{out}: {new:,} new, {len(table):,} in all, under {under}")
    found = {}
    for source in sorted({one.source for one in chosen}):
        own = [table[one.id] for one in chosen if one.source == source]
        difference_N = np.array([one.difference for one in own])
        known_N = difference_N[np.isfinite(difference_N)]
        found[source] = {
            "questions": len(own),
            "unscored": len(own) - len(known_N),
            "mean_difference": float(known_N.mean()) if len(known_N) else None,
            "rank_correlations": {
                name: None if one is None else one._asdict() for name, one in correlations(own).items()
            },
        }
        print(f"{source}: {len(own):,} questions, mean difference {known_N.mean() if len(known_N) else np.nan:.4g}")
        for name, one in correlations(own).items():
            if one is not None:
                print(f"  {name}: {one.rho:.3f} ({one.low:.3f} to {one.high:.3f})")
    print(json.dumps({"under": under, "sources": found}))
    return 0
