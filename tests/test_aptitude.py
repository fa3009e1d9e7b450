"""Aptitude selection without a model: anchors, scores of a planted preference, rule H and its controls."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unipool_jax.aptitude.anchors import choose_anchors, k_means, medoids, tf_idf
from unipool_jax.aptitude.candidates import Candidate, fingerprint, read_candidates
from unipool_jax.aptitude.rule import Choice, SourceRule, Variant, choose, parse_rule, threshold
from unipool_jax.aptitude.scores import Score, Shown, append_scores, read_scores, score
from unipool_jax.aptitude.selection import select, training_lines
from unipool_jax.cli.main import execute
from unipool_jax.config.errors import UserError

RULES = {"a": SourceRule("cot", 0.3), "b": SourceRule("tir", 0.65)}


def candidate(number: int, source: str = "a", solutions: int = 1) -> Candidate:
    texts = {kind: tuple(f"{kind} {number} {j}" for j in range(solutions)) for kind in ("cot", "tir")}
    return Candidate(f"{source}{number:03}", source, f"question {number}", texts["cot"], texts["tir"], str(number))


def scored(differences: dict[str, float]) -> dict[str, Score]:
    return {name: Score(name, "u", 0, 0.5 + d, 0.5, 0.01) for name, d in differences.items()}


# Anchors


def least_inertia(points: np.ndarray, clusters: int) -> float:
    """Of all ways to divide points into clusters, by trying them."""
    best = math.inf
    for labels in itertools.product(range(clusters), repeat=len(points)):
        groups = [[p for p, own in zip(points, labels, strict=True) if own == k] for k in range(clusters)]
        if all(groups):
            best = min(best, sum(float(((np.array(g) - np.mean(g, axis=0)) ** 2).sum()) for g in groups))
    return best


def test_k_means_is_a_fixed_point_and_finds_the_best_of_separate_clusters() -> None:
    rng = np.random.default_rng(0)
    points = np.concatenate([center + rng.normal(size=(2, 2)) for center in ([0, 0], [20, 0], [0, 20])])
    least = least_inertia(points, 3)
    for seed in range(4):
        cluster, centers = k_means(points, 3, seed)
        assert sum(math.dist(p, centers[k]) ** 2 for p, k in zip(points, cluster, strict=True)) == pytest.approx(least)
    points = rng.normal(size=(40, 3))
    cluster, centers = k_means(points, 6, 1)
    for point, own in zip(points, cluster, strict=True):
        distances = [math.dist(point, center) for center in centers]
        assert distances[own] == min(distances)
    for k in range(6):
        assert centers[k] == pytest.approx(points[cluster == k].mean(axis=0))
    for k, medoid in enumerate(medoids(points, cluster, centers)):
        members = [n for n in range(40) if cluster[n] == k]
        assert medoid == min(members, key=lambda n: math.dist(points[n], centers[k]))


def test_no_cluster_is_empty_although_points_are_the_same() -> None:
    points = np.array([[0.0], [0.0], [0.0], [5.0]])
    cluster, centers = k_means(points, 3, 0)
    assert sorted(set(cluster.tolist())) == [0, 1, 2]
    assert len(set(medoids(points, cluster, centers).tolist())) == 3


def test_anchors_do_not_depend_on_the_order_of_the_file() -> None:
    candidates = [candidate(n, source) for source in "ab" for n in range(30)]
    vectors = np.random.default_rng(1).normal(size=(60, 4))
    order = np.random.default_rng(2).permutation(60)
    found = choose_anchors(candidates, vectors, 5, 3)
    again = choose_anchors([candidates[n] for n in order], vectors[order], 5, 3)
    assert found == again
    assert fingerprint(candidates) == fingerprint([candidates[n] for n in order])
    assert {source: len({one.id for one in chosen}) for source, chosen in found.items()} == {"a": 5, "b": 5}
    assert choose_anchors(candidates, vectors, 5, 4) != found
    with pytest.raises(UserError, match="count=31: source a has 30"):
        choose_anchors(candidates, vectors, 31, 0)


def test_tf_idf_by_hand() -> None:
    found = tf_idf(["One one two", "two", "?"])
    one, two = 2 * (math.log(4 / 2) + 1), math.log(4 / 3) + 1  # columns: the word of most texts first
    assert found[0] == pytest.approx(np.array([two, one]) / math.hypot(one, two))
    assert found[1:].tolist() == [[1.0, 0.0], [0.0, 0.0]]


# Scores


ANCHORS = [{"id": f"x{n}", "question": f"q{n}", "answer": str(n)} for n in range(4)]


def planted(asked: Sequence[Shown]) -> list[float | None]:
    """Text helps with anchors 0, 1 and 2, programs with anchor 3."""
    return [float((one.solution.startswith("cot")) == (one.anchor in ("q0", "q1", "q2"))) for one in asked]


def test_a_score_is_the_mean_over_anchors() -> None:
    found = score(candidate(1), ANCHORS, planted, 0, "u")
    assert (found.cot, found.tir, found.difference) == (0.75, 0.25, 0.5)
    assert found.error == pytest.approx(np.std([1, 1, 1, -1], ddof=1) / 2)
    # A question is not scored on itself: its solution has the answer.
    own = [*ANCHORS[:3], {"id": "a001", "question": "q3", "answer": "3"}]
    assert (score(candidate(1), own, planted, 0, "u").cot) == 1.0
    unread = score(candidate(1), ANCHORS, lambda asked: [None, *planted(asked)[1:]], 0, "u")
    assert (unread.cot, unread.error, math.isnan(unread.difference)) == (None, None, True)


def test_the_solution_shown_is_drawn_by_id_and_seed() -> None:
    many = [candidate(n, solutions=3) for n in range(90)]
    drawn = [[one.pair(seed) for one in many] for seed in (0, 1)]
    assert drawn[0] != drawn[1]
    assert all(20 <= drawn[0].count(j) <= 40 for j in range(3))
    seen: list[Shown] = []
    score(many[0], ANCHORS[:1], lambda asked: [seen.append(one) or 0.0 for one in asked], 0, "u")  # type: ignore[func-returns-value]
    assert [one.solution for one in seen] == [f"cot 0 {drawn[0][0]}", f"tir 0 {drawn[0][0]}"]


def test_scoring_that_was_killed_goes_on(tmp_path: Path) -> None:
    candidates = [candidate(n) for n in range(6)]
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    assert len(list(append_scores(whole, candidates, {"a": ANCHORS}, planted, 0, "u"))) == 6
    running: Iterator[Score] = append_scores(part, candidates, {"a": ANCHORS}, planted, 0, "u")
    for _ in range(3):
        next(running)
    del running
    with part.open("ab") as file:  # killed while it wrote
        file.write(b'{"id": "a003", "un')
    assert len(list(append_scores(part, candidates, {"a": ANCHORS}, planted, 0, "u"))) == 3
    assert part.read_bytes() == whole.read_bytes()
    assert list(append_scores(part, candidates, {"a": ANCHORS}, planted, 0, "u")) == []
    with pytest.raises(UserError, match="another model"):
        list(append_scores(part, candidates, {"a": ANCHORS}, planted, 0, "v"))
    with pytest.raises(UserError, match="none of source a"):
        list(append_scores(part, candidates, {"b": ANCHORS}, planted, 0, "u"))
    assert len(read_scores(whole)) == 6


def recovered(anchors: int, likely: float, unlikely: float) -> float:
    """Probability that the better format has more right answers of `anchors`, from two binomials."""

    def binomial(p: float) -> list[float]:
        return [math.comb(anchors, k) * p**k * (1 - p) ** (anchors - k) for k in range(anchors + 1)]

    better, worse = binomial(likely), binomial(unlikely)
    return sum(better[i] * worse[j] for i in range(anchors + 1) for j in range(i))


@pytest.mark.parametrize("anchors", [10, 100])
def test_how_often_a_planted_preference_is_found(anchors: int) -> None:
    """At 5 points of difference the better format leads for 74% of questions with 100 anchors, and for 50% with 10."""
    rng = np.random.default_rng(anchors)
    names = [{"id": f"x{n}", "question": str(n), "answer": ""} for n in range(anchors)]

    def noisy(asked: Sequence[Shown]) -> list[float | None]:
        return [float(rng.random() < (0.55 if one.solution.startswith("cot") else 0.5)) for one in asked]

    trials = 1500
    right = sum(score(candidate(n), names, noisy, 0, "u").difference > 0 for n in range(trials)) / trials
    expected = recovered(anchors, 0.55, 0.5)
    assert round(expected, 2) == {10: 0.50, 100: 0.74}[anchors]
    assert right == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / trials))


# The rule


def test_quantiles_give_the_sizes_asked_for() -> None:
    difference = np.random.default_rng(0).permutation(100) / 100.0
    low = choose("tata", SourceRule("cot", 0.3), difference)
    assert low.cot_N.all()
    assert set(difference[low.tir_N]) == {n / 100 for n in range(30)}
    high = choose("tata", SourceRule("tir", 0.65), difference)
    assert high.tir_N.all()
    assert set(difference[high.cot_N]) == {n / 100 for n in range(65, 100)}
    for quantile in (0.0, 0.1, 0.5, 1.0):
        cut = threshold(difference, quantile)
        assert cut is not None
        assert (difference < cut).sum() == math.ceil(quantile * 99 - 1e-9)


def test_what_is_equal_to_the_threshold_is_neither_below_nor_above() -> None:
    difference = np.array([-0.5, 0.0, 0.0, 0.0, 0.5])
    for quantile in (0.3, 0.5, 0.7):
        assert choose("tata", SourceRule("cot", quantile), difference).tir_N.tolist() == [True, *[False] * 4]
        assert choose("tata", SourceRule("tir", quantile), difference).cot_N.tolist() == [*[False] * 4, True]


def test_planted_sets_are_found_without_noise() -> None:
    """Of each source, the questions that prefer the other format, and no others, come in both."""
    names = {source: [f"{source}{n:03}" for n in range(20)] for source in "ab"}
    other = {"a": set(names["a"][:6]), "b": set(names["b"][13:])}
    differences = {n: (-0.4 if n in other["a"] else 0.4) + 1e-3 * i for i, n in enumerate(names["a"])}
    differences |= {n: (0.4 if n in other["b"] else -0.4) + 1e-3 * i for i, n in enumerate(names["b"])}
    candidates = [candidate(n, source, solutions=2) for n in range(20) for source in "ab"]
    found = select(candidates, scored(differences), RULES, "tata")
    lines = [json.loads(line) for line in training_lines(found)]
    assert len(lines) == 2 * (20 + 6 + 20 + 7)
    for source, chosen in other.items():
        extra = "tir" if source == "a" else "cot"
        assert {line["id"] for line in lines if line["source"] == source and line["format"] == extra} == chosen
    shuffled = select(candidates[::-1], scored(differences), RULES, "tata")
    assert training_lines(shuffled) == training_lines(found)


@pytest.mark.parametrize("rule", RULES.values())
def test_variants(rule: SourceRule) -> None:
    difference = np.random.default_rng(3).normal(size=50)
    difference[7] = np.nan
    kept: dict[str, Choice] = {name: choose(name, rule, difference, seed=5) for name in _VARIANTS}
    for name, cot, tir in (("both", 1, 1), ("cot", 1, 0), ("tir", 0, 1)):
        assert (kept[name].cot_N == cot).all()
        assert (kept[name].tir_N == tir).all()
    one = kept["one_format"]
    assert (one.cot_N ^ one.tir_N).all()
    assert one.cot_N[7] == (rule.default == "cot")
    tata, random = kept["tata"], kept["random"]
    assert (tata.cot_N.sum(), tata.tir_N.sum()) == (random.cot_N.sum(), random.tir_N.sum())
    both = [(each.cot_N & each.tir_N).tolist() for each in (tata, random, choose("random", rule, difference, seed=6))]
    assert not both[0][7]
    assert both[0] != both[1] != both[2]


_VARIANTS: tuple[Variant, ...] = ("tata", "one_format", "both", "cot", "tir", "random")


def test_the_control_draws_every_question_alike() -> None:
    difference = np.arange(20.0)
    drawn = sum(choose("random", RULES["a"], difference, seed).tir_N.astype(int) for seed in range(400))
    assert np.abs(np.asarray(drawn) / 400 - 0.3).max() < 4 * math.sqrt(0.3 * 0.7 / 400)


@pytest.mark.parametrize("word", ["gsm8k", "gsm8k:cot", "gsm8k:text:0.3", ":cot:0.3", "gsm8k:cot:1.3", "gsm8k:cot:nan"])
def test_rules_that_are_none(word: str) -> None:
    with pytest.raises(UserError, match="expected SOURCE:FORMAT:QUANTILE"):
        parse_rule(word)


def test_a_source_may_have_colons() -> None:
    assert parse_rule("hub:math:tir:0.65") == ("hub:math", SourceRule("tir", 0.65))


# Commands


def written(path: Path, candidates: Sequence[Candidate], **changes: Any) -> Path:
    path.write_text("".join(f"{json.dumps(one.as_json() | changes)}\n" for one in candidates), encoding="utf-8")
    return path


def test_from_candidates_to_a_selection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    candidates = [candidate(n, source, solutions=2) for n in range(10) for source in "ab"]
    path, out = written(tmp_path / "c.jsonl", candidates), tmp_path / "sft.jsonl"
    assert read_candidates(path) == candidates
    assert execute(["aptitude", "anchors", str(path), f"out={tmp_path / 'anchors.json'}", "count=3"]) == 0
    anchors = json.loads((tmp_path / "anchors.json").read_text(encoding="utf-8"))
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=(20, 2)))
    words = [f"out={tmp_path / 'other.json'}", "count=3", f"embeddings={tmp_path / 'v.npy'}"]
    assert execute(["aptitude", "anchors", str(path), *words]) == 0
    for source, part in (("a", "1"), ("b", "2")):
        own = [one for one in candidates if one.source == source]
        list(append_scores(tmp_path / f"{part}.jsonl", own, anchors["anchors"], planted, 0, "u"))
    words = [str(path), f"scores=[{tmp_path / '1.jsonl'},{tmp_path / '2.jsonl'}]", "rules=[a:cot:0.3,b:tir:0.65]"]
    assert execute(["aptitude", "select", *words, f"out={out}"]) == 0
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])["sources"]
    # All differences are equal, so no question is below or above.
    assert (counts["a"]["questions_both"], counts["b"]["questions_both"]) == (0, 0)
    assert (counts["a"]["solutions_cot"], counts["a"]["solutions_tir"], counts["a"]["at_threshold"]) == (20, 0, 10)
    lines = out.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {
        **{"id": "a000", "source": "a", "format": "cot"},
        **{"prompt": "question 0", "response": "cot 0 0"},
    }
    manifest = json.loads((tmp_path / "sft.jsonl.manifest.json").read_text(encoding="utf-8"))
    assert (manifest["scored_under"], manifest["settings"]["variant"], len(lines)) == ("u", "tata", 40)
    assert manifest["candidates_sha256"] == anchors["candidates_sha256"]
    assert execute(["aptitude", "select", str(path), *words[2:], f"out={out}", "variant=both"]) == 0
    assert len(out.read_text(encoding="utf-8").splitlines()) == 80


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cot": ["one", "two"]}, "line 1: 2 solutions in cot and 1 in tir"),
        ({"cot": [], "tir": []}, "0 solutions"),
        ({"tir": [3]}, "tir.0 is 3, expected text"),
        ({"id": "same"}, "line 2: the id 'same' was there before"),
        ({"answer": 3}, "answer is 3"),
    ],
)
def test_bad_candidates_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "c.jsonl", [candidate(0), candidate(1)], **changes)
    with pytest.raises(UserError, match=message):
        execute(["aptitude", "anchors", str(path), f"out={tmp_path / 'x'}", "count=1"])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 2)), "3 rows for 2 candidates"),
        (np.array([[0.0], [math.nan]]), "row 1 is not finite"),
        (np.zeros(2), "a row of numbers"),
    ],
)
def test_bad_embeddings_are_refused(array: np.ndarray, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "c.jsonl", [candidate(0), candidate(1)])
    np.save(tmp_path / "v.npy", array)
    words = [f"out={tmp_path / 'x'}", "count=1", f"embeddings={tmp_path / 'v.npy'}"]
    with pytest.raises(UserError, match=message):
        execute(["aptitude", "anchors", str(path), *words])


def test_bad_selections_are_refused() -> None:
    candidates = [candidate(0), candidate(1)]
    scores = scored({"a000": 0.1, "a001": 0.2})
    only_a = {"a": RULES["a"]}
    with pytest.raises(UserError, match="1 candidates have none, the first a001"):
        select(candidates, scored({"a000": 0.1}), only_a, "tata")
    with pytest.raises(UserError, match="a001 is no candidate"):
        select(candidates[:1], scores, only_a, "tata")
    with pytest.raises(UserError, match="no candidate has the source b"):
        select(candidates, scores, RULES, "tata")
    with pytest.raises(UserError, match="none for the source a"):
        select(candidates, scores, {}, "tata")
    with pytest.raises(UserError, match="not all of one model"):
        select(candidates, scores | {"a001": scores["a001"]._replace(under="v")}, only_a, "tata")
