"""Collections, exact search, the measures of trec_eval and BM25, against slow versions and against trec_eval itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval

from unipool_jax.config.files import FileError
from unipool_jax.retrieval.baselines import K1, B, bm25_scorer, random_scorer, words
from unipool_jax.retrieval.folder import Collection, make_index, read_collection, write_collection
from unipool_jax.retrieval.metrics import Quality, measure
from unipool_jax.retrieval.search import cosine_scorer, search

TINY = Collection(
    {"a": "open a file", "b": "close a file", "c": "open a file", "d": ""},
    {"q1": "open", "q2": "close it"},
    {"q1": {"a": 1}, "q2": {"b": 2, "d": 0}},
)


def ranked_ids(scores: Mapping[str, float]) -> list[str]:
    """The order of trec_eval: by score as a 32-bit float, then by id, both descending."""
    return sorted(scores, key=lambda name: (float(np.float32(scores[name])), name), reverse=True)


def slow_ndcg(ranking: Sequence[str], grades: Mapping[str, int]) -> float:
    def gain(values: Sequence[int]) -> float:
        return sum(max(value, 0) / math.log2(rank + 1) for rank, value in enumerate(values[:10], 1))

    ideal = gain(sorted(grades.values(), reverse=True))
    return gain([grades.get(name, 0) for name in ranking]) / ideal if ideal else 0.0


def graded(seed: int, documents: int = 30) -> tuple[Collection, np.ndarray]:
    """A collection of eight queries with grades from -1 to 3, and scores with many ties, `[Q, D]` by ascending id."""
    rng = np.random.default_rng(seed)
    names = [f"d{number}" for number in rng.permutation(documents * 7)[:documents]]
    grades = {}
    for query in range(8):
        judged = rng.choice(names, rng.integers(1, 15), replace=False)
        grades[f"q{query}"] = {str(name): int(rng.integers(-1, 4)) for name in judged}
    texts = {name: f"text {name}" for name in sorted(names)}
    scores_QD = rng.integers(0, 6, (8, documents)).astype(np.float32) / 3
    return Collection(texts, dict.fromkeys(grades, "?"), grades), scores_QD


def measured(collection: Collection, scores_QD: np.ndarray, depth: int = 1000) -> Quality:
    index = make_index(collection)
    by_text_QU = scores_QD[:, ::-1]  # an index has descending ids
    return measure(search(lambda part: by_text_QU[part], len(by_text_QU), index.text_D, depth), index.grades)


@pytest.mark.parametrize("seed", range(40))
def test_measures_are_those_of_trec_eval(seed: int) -> None:
    """Graded, with ties, negative grades and queries without a relevant document: 320 runs."""
    collection, scores_QD = graded(seed)
    run = {
        query: {name: float(score) for name, score in zip(collection.documents, row, strict=True)}
        for query, row in zip(collection.queries, scores_QD, strict=True)
    }
    found = measured(collection, scores_QD)
    judge = pytrec_eval.RelevanceEvaluator(collection.grades, {"ndcg_cut_10", "map", "recall_100", "P_1"})
    expected = judge.evaluate(run)
    for row, (query, scores) in enumerate(run.items()):
        assert found.ndcg_10[row] == pytest.approx(expected[query]["ndcg_cut_10"], abs=1e-12)
        assert found.map[row] == pytest.approx(expected[query]["map"], abs=1e-12)
        assert found.recall_100[row] == pytest.approx(expected[query]["recall_100"], abs=1e-12)
        assert found.first[row] == expected[query]["P_1"]
        slow = slow_ndcg(ranked_ids(scores), collection.grades[query])
        assert found.ndcg_10[row] == pytest.approx(slow, abs=1e-12)


def test_recall_counts_the_first_hundred() -> None:
    ranked = np.arange(150)[None]
    assert measure(ranked, [{99: 1, 100: 1}]).recall_100 == pytest.approx([0.5])
    assert measure(ranked[:, :50], [{49: 1, 100: 1}]).map == pytest.approx([0.5 / 50])


@pytest.mark.parametrize(("rank", "value"), [(1, 1.0), (2, 0.6309), (10, 0.2891), (11, 0.0)])
def test_one_relevant_document(rank: int, value: float) -> None:
    found = measure(np.arange(1, 21)[None], [{rank: 1}])
    assert found.ndcg_10[0] == pytest.approx(value, abs=5e-5)
    assert found.map[0] == pytest.approx(1 / rank)


@pytest.mark.parametrize(("copies", "value"), [(2, 0.815), (3, 0.710), (4, 0.640), (5, 0.590)])
def test_copies_cap_the_standard_score_and_not_the_other(copies: int, value: float) -> None:
    """Of m copies of a text one is labeled: whichever it is, a perfect search has this mean nDCG@10."""
    documents = {f"d{number}": "same" for number in range(copies)} | {"e": "other"}
    queries = {f"q{number}": "?" for number in range(copies)}
    collection = Collection(documents, queries, {f"q{number}": {f"d{number}": 1} for number in range(copies)})
    index = make_index(collection)

    def perfect(part: slice) -> np.ndarray:
        return np.tile(np.array([text == "same" for text in index.texts], np.float32), (copies, 1))[part]

    standard = measure(search(perfect, copies, index.text_D, 10), index.grades)
    assert standard.ndcg_10.mean() == pytest.approx(value, abs=5e-4)
    merged = measure(search(perfect, copies, np.arange(len(index.texts)), 10), index.text_grades)
    assert merged.ndcg_10.tolist() == [1.0] * copies


@pytest.mark.parametrize("seed", range(20))
def test_merging_copies_lowers_no_score(seed: int) -> None:
    """With one relevant document for each query, and ties between texts."""
    rng = np.random.default_rng(seed)
    documents = {f"d{number}": f"text {rng.integers(12)}" for number in rng.permutation(30)}
    queries = {f"q{number}": "?" for number in range(30)}
    collection = Collection(documents, queries, {f"q{number}": {f"d{number}": 1} for number in range(30)})
    index = make_index(collection)
    scores_QU = rng.integers(0, 4, (30, len(index.texts))).astype(np.float32)
    standard = measure(search(lambda part: scores_QU[part], 30, index.text_D, 100), index.grades)
    merged = measure(search(lambda part: scores_QU[part], 30, np.arange(len(index.texts)), 100), index.text_grades)
    assert (merged.ndcg_10 >= standard.ndcg_10).all()
    assert (merged.map >= standard.map).all()


def test_relevant_copies_are_one_text() -> None:
    copies = {"a": "x", "b": "x", "c": "y"}
    index = make_index(Collection(copies, {"q": "?"}, {"q": {"b": 3, "a": 1, "c": 2}}))
    assert index.texts == ["y", "x"]
    assert index.text_D.tolist() == [0, 1, 1]
    assert index.grades == [{2: 1, 1: 3, 0: 2}]
    assert index.text_grades == [{1: 3, 0: 2}]


def test_search_in_parts_is_search_at_once() -> None:
    """Small whole numbers have exact products; ties are in every row, and one row is all zeros."""
    rng = np.random.default_rng(0)
    queries_QC, texts_UC = rng.integers(-2, 3, (23, 4)), rng.integers(-2, 3, (40, 4))
    queries_QC[5] = 0
    text_D = rng.integers(0, 40, 70)

    def scorer(part: slice) -> np.ndarray:
        return (queries_QC[part] @ texts_UC.T).astype(np.float32)

    whole = search(scorer, 23, text_D, 15)
    for most in (1, 70, 71, 500):
        np.testing.assert_array_equal(search(scorer, 23, text_D, 15, most), whole)
    scores_QD = scorer(slice(0, 23))[:, text_D]
    slow = [sorted(range(70), key=lambda place, row=row: (-scores_QD[row, place], place))[:15] for row in range(23)]  # type: ignore[misc]
    np.testing.assert_array_equal(whole, slow)
    assert search(scorer, 23, text_D, 1000).shape == (23, 70)


def test_cosines() -> None:
    rng = np.random.default_rng(1)
    queries_QC, texts_UC = rng.normal(size=(3, 5)), rng.normal(size=(4, 5)) * 1e3
    found = cosine_scorer(queries_QC, texts_UC)(slice(1, 3))
    for row, query in enumerate(queries_QC[1:]):
        for column, text in enumerate(texts_UC):
            slow = sum(a * b for a, b in zip(query, text, strict=True)) / math.hypot(*query) / math.hypot(*text)
            assert found[row, column] == pytest.approx(slow, abs=1e-6)
    assert cosine_scorer(np.zeros((1, 5)), texts_UC)(slice(0, 1)).tolist() == [[0.0] * 4]


def slow_bm25(query: str, texts: Sequence[str]) -> list[float]:
    documents = [words(text) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in words(query):
            holding = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            count = document.count(word)
            score += idf * count * (K1 + 1) / (count + K1 * (1 - B + B * len(document) / mean))
        scores.append(score)
    return scores


def test_bm25_is_its_formula() -> None:
    rng = np.random.default_rng(2)
    texts = [" ".join(rng.choice(list("abcdefgh"), rng.integers(0, 12))) for _ in range(9)]
    queries = ["a b", "a a c", "unknown", "", "h_g readA"]
    found = bm25_scorer(queries, texts)(slice(0, 5))
    np.testing.assert_allclose(found, [slow_bm25(query, texts) for query in queries], rtol=1e-6)
    assert found[0].max() > found[0].min()
    np.testing.assert_array_equal(bm25_scorer(queries, texts)(slice(1, 3)), found[1:3])
    assert bm25_scorer(["a"], ["", ""])(slice(0, 1)).tolist() == [[0.0, 0.0]]


def test_words_of_code() -> None:
    assert words("def readLines(max_size=3, *, HTTPError):  # Größe") == [
        *("def", "read", "lines", "max", "size", "3", "httperror", "größe")
    ]


def test_chance() -> None:
    """The seed and the query decide; the mean reciprocal rank is that of a uniform rank."""
    scorer = random_scorer(50, seed=3)
    np.testing.assert_array_equal(scorer(slice(2, 4)), scorer(slice(0, 9))[2:4])
    assert not np.array_equal(random_scorer(50, seed=4)(slice(0, 1)), scorer(slice(0, 1)))
    found = measure(search(scorer, 2000, np.arange(50), 50), [{7: 1}] * 2000)
    assert found.map.mean() == pytest.approx(sum(1 / rank for rank in range(1, 51)) / 50, abs=0.015)


def test_a_collection_comes_back(tmp_path: Path) -> None:
    write_collection(tmp_path, {"test": TINY})
    assert read_collection(tmp_path) == TINY
    (tmp_path / "corpus.jsonl").write_text(
        '{"_id": "a", "title": "T", "text": "x"}\n{"_id": "b", "title": null, "text": "y"}\n{"_id": "d", "text": "z"}\n'
    )
    assert read_collection(tmp_path).documents == {"a": "x", "b": "y", "d": "z"}
    assert read_collection(tmp_path, titles=True).documents == {"a": "T x", "b": "y", "d": "z"}
    # Without its header, and with a query that nothing is judged for.
    (tmp_path / "qrels" / "dev.tsv").write_text("q2\ta\t1\n")
    assert read_collection(tmp_path, "dev").queries == {"q2": "close it"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", None, "corpus.jsonl"),
        ("corpus.jsonl", "", "empty"),
        ("corpus.jsonl", '{"_id": "a"}\n', "line 1: text is missing"),
        ("corpus.jsonl", '{"_id": 1, "text": ""}\n', "_id is 1, expected text"),
        ("corpus.jsonl", '{"_id": "a", "text": ""}\n' * 2, "line 2: the id 'a' is there twice"),
        ("corpus.jsonl", '{"_id": "a", "text": "", "title": 3}\n', "title is 3, expected text"),
        ("queries.jsonl", "{\n", "line 1"),
        ("qrels/test.tsv", None, "test.tsv"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "no judgments"),
        ("qrels/test.tsv", "q1 a 1\n", "line 1: 'q1 a 1', expected a query"),
        ("qrels/test.tsv", "q1\ta\t0.5\n", "whole number"),
        ("qrels/test.tsv", "q9\ta\t1\n", "the query 'q9' is not in queries.jsonl"),
        ("qrels/test.tsv", "q1\tz\t1\n", "the document 'z' is not in corpus.jsonl"),
        ("qrels/test.tsv", "q1\ta\t1\nq1\ta\t0\n", "line 2: 'q1' and 'a' are there twice"),
        ("qrels/test.tsv", b"q1\t\xff\t1\n", "not UTF-8"),
    ],
)
def test_a_damaged_collection(name: str, content: str | bytes | None, message: str, tmp_path: Path) -> None:
    write_collection(tmp_path, {"test": TINY})
    path = tmp_path / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(FileError, match=message):
        read_collection(tmp_path, titles=True)
