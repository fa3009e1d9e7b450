"""Embeddings of texts, contrastive fine-tuning, `unipool retrieval eval` and `unipool retrieval tune`."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiny import tiny_config, tiny_state
from unipool_jax.cli.main import execute
from unipool_jax.config.errors import UserError
from unipool_jax.config.files import FileError
from unipool_jax.config.schema import ConfigError
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.runs import as_numpy, write_run
from unipool_jax.data.tokenizer import load_tokenizer
from unipool_jax.evaluation.scoring import LanguageModel
from unipool_jax.model.transformer import apply
from unipool_jax.moe.lock import Candidate
from unipool_jax.retrieval.command import summarize
from unipool_jax.retrieval.embedding import embed, hidden_states, pool
from unipool_jax.retrieval.folder import Collection, make_index, write_collection
from unipool_jax.retrieval.tuning import Example, batches, examples, info_nce
from unipool_jax.training.state import layer_inputs

TEXTS = ["def f(x): return x", "", "a much longer text than the others, cut", "é"]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    config = tiny_config("unipool", "model.num_layers=2", "model.vocab_size=320", "data.sequence_length=32")
    state = tiny_state(config)
    # Gains other than 1, so that a final norm can be told from none.
    params = state.params | {"final_norm": jnp.linspace(0.5, 1.5, config.model.hidden_size)}
    return LanguageModel(config, params, state.balance, load_tokenizer("bytes"))


@pytest.fixture(scope="module")
def run(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    write_run(folder, model.config, as_numpy(model.params, model.balance.expert_bias_GNE))
    return folder


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Queries are documents, so that a search by embeddings finds them; one of them is there twice."""
    folder = tmp_path_factory.mktemp("collection")
    texts = {name: f"{name} {name * 2}" for name in "abcdef"} | {"g": "a aa"}
    queries = {f"q{name}": texts[name] for name in "abc"}
    tests = Collection(texts, queries, {f"q{name}": {name: 1} for name in "abc"})
    lessons = {f"t{name}": query for name, query in zip("abcdef", "uvwxyz", strict=True)}
    train = Collection(texts, lessons, {name: {name[1]: 1} for name in lessons})
    write_collection(folder, {"test": tests, "train": train})
    return folder


def tokens_of(model: LanguageModel, text: str) -> np.ndarray:
    tokens = model.tokenizer.encode_batch([text])[0][: model.max_length]
    return tokens if len(tokens) else np.array([model.tokenizer.eod], np.int32)


def test_pooling_sees_the_text_only() -> None:
    rng = np.random.default_rng(0)
    hidden_BSD = rng.normal(size=(3, 7, 4)).astype(np.float32)
    lengths_B = np.array([7, 1, 4], np.int32)
    for row, length in enumerate(lengths_B):
        hidden_BSD[row, length:] = np.nan
    mean, last = (np.asarray(pool(how, jnp.asarray(hidden_BSD), lengths_B)) for how in ("mean", "last"))
    for row, length in enumerate(lengths_B):
        np.testing.assert_allclose(mean[row], hidden_BSD[row, :length].sum(axis=0) / length, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(last[row], hidden_BSD[row, length - 1])


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_without_layers_an_embedding_is_that_of_its_tokens(model: LanguageModel, pooling: str) -> None:
    found = embed(model, hidden_states(model, 0), TEXTS, pooling)  # type: ignore[arg-type]
    table_VD = np.asarray(model.params["embedding"].astype(model.config.model.compute_dtype).astype(jnp.float32))
    for text, vector_D in zip(TEXTS, found.vectors_ND, strict=True):
        rows = table_VD[tokens_of(model, text)]
        np.testing.assert_allclose(vector_D, rows.mean(axis=0) if pooling == "mean" else rows[-1], rtol=1e-5, atol=1e-6)
    assert found.cut == 1


def test_the_last_layer_by_two_ways_and_without_padding(model: LanguageModel) -> None:
    """All layers one by one and then the final norm in NumPy; the whole model; and a text alone, without padding."""
    config = model.config
    final = embed(model, hidden_states(model, None), TEXTS, "last").vectors_ND
    before = embed(model, hidden_states(model, 2), TEXTS, "last").vectors_ND
    scale = np.sqrt(np.mean(before**2, axis=1, keepdims=True) + config.model.norm_epsilon)
    np.testing.assert_allclose(final, before / scale * np.asarray(model.params["final_norm"]), rtol=0.02, atol=0.02)
    assert np.abs(final - before).max() > 0.1
    inputs = layer_inputs(config, model.balance)
    alone = apply(config, model.params, tokens_of(model, TEXTS[0])[None], inputs).head.hidden_BSD[0, -1]
    np.testing.assert_allclose(final[0], np.asarray(alone, np.float32), rtol=0.02, atol=0.02)


def test_layers_that_are_not_there(model: LanguageModel) -> None:
    with pytest.raises(UserError, match="layer=3: the model has 2"):
        hidden_states(model, 3)
    owners_M = jnp.zeros(model.config.total_experts, jnp.int32)

    def with_lock(fade: float) -> LanguageModel:
        return model._replace(balance=model.balance._replace(lock=Candidate(owners_M, jnp.float32(fade))))

    hidden_states(with_lock(0.0), 1)
    with pytest.raises(UserError, match="layer=1: at this step UniPool-lock"):
        hidden_states(with_lock(0.5), 1)


def test_the_command(run: Path, collection: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(run), f"data=[{collection}]", "layer=0", "limit=2"]
    assert execute(["retrieval", "eval", *words]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert "mean of layer 0, without titles" in "".join(table)
    document = json.loads(last)
    assert (document["pooling"], document["layer"], document["titles"]) == ("mean", 0, False)
    results = {result["retriever"]: result for result in document["results"]}
    assert list(results) == ["model", "bm25", "random"]
    assert all((r["queries"], r["documents"], r["texts"]) == (2, 7, 6) for r in results.values())
    for name in ("model", "bm25"):  # "a" has a copy with a greater id; "b" is first
        assert results[name]["ndcg_10"] == pytest.approx((1 / np.log2(3) + 1) / 2)
        assert results[name]["ndcg_10_texts"] == 1.0
        assert results[name]["first"] == 0.5
    assert results["random"]["ndcg_10"] < 1


def test_what_the_command_refuses(run: Path, collection: Path) -> None:
    with pytest.raises(ConfigError, match="which collections"):
        execute(["retrieval", "eval", str(run)])
    with pytest.raises(FileError, match=r"corpus\.jsonl"):
        execute(["retrieval", "eval", str(run), f"data=[{run}]"])
    with pytest.raises(FileError, match=r"dev\.tsv"):
        execute(["retrieval", "eval", str(run), f"data=[{collection}]", "split=dev"])


def test_standard_errors() -> None:
    """Of one query there is none, and the last line stays JSON."""
    index = make_index(Collection({"a": "x", "b": "y"}, {"q": "?"}, {"q": {"a": 1}}))
    one = summarize("c", "r", index, lambda part: np.array([[0.0, 1.0]], np.float32))
    assert (one.ndcg_10, one.first, one.map) == (1.0, 1.0, 1.0)
    assert np.isnan(one.ndcg_10_stderr)
    both = index._replace(grades=index.grades * 2, text_grades=index.text_grades * 2)
    two = summarize("c", "r", both, lambda part: np.array([[0, 1], [1, 0]], np.float32)[part])
    assert two.ndcg_10_stderr == pytest.approx((1 - 1 / np.log2(3)) / 2)


def slow_info_nce(queries: np.ndarray, documents: np.ndarray, negative: np.ndarray, temperature: float) -> float:
    total = 0.0
    for i, query in enumerate(queries):
        cosines = [query @ one / np.linalg.norm(query) / np.linalg.norm(one) / temperature for one in documents]
        others = sum(np.exp(cosines[j]) for j in range(len(documents)) if j != i and negative[i, j])
        total -= np.log(np.exp(cosines[i]) / (np.exp(cosines[i]) + others))
    return float(total / len(queries))


def test_info_nce_and_its_gradient() -> None:
    """Against the formula in float64; masked documents have no part in value or gradient."""
    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(2, 5, 3))
    negative = rng.random((5, 5)) < 0.6
    negative[0] = False  # alone with its own document: a loss of 0
    value, gradient = jax.value_and_grad(info_nce, argnums=(0, 1))(
        jnp.asarray(queries, jnp.float32), jnp.asarray(documents, jnp.float32), negative, 0.3
    )
    assert float(value) == pytest.approx(slow_info_nce(queries, documents, negative, 0.3), rel=1e-5)
    for array, found in zip((queries, documents), gradient, strict=True):
        slow = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            kept = array[place]
            values = []
            for shift in (1e-5, -1e-5):
                array[place] = kept + shift
                values.append(slow_info_nce(queries, documents, negative, 0.3))
            array[place] = kept
            slow[place] = (values[0] - values[1]) / 2e-5
        np.testing.assert_allclose(found, slow, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(gradient[0][0], 0.0)


def test_batches_hold_queries_and_their_documents() -> None:
    """Each query once in a pass, a document of its own beside it, and no relevant text as a negative."""
    tokenizer = load_tokenizer("bytes")
    found = [Example(f"q{n}", (f"d{n}", f"e{n}")) for n in range(4)] + [Example("twin of 0", ("d0",))]
    answers = {one.query: one.answers for one in found}
    drawn = [rows for rows, _ in zip(batches(found, tokenizer, 5, 12, seed=0), range(20), strict=False)]
    seen = set()
    for rows in drawn:
        texts = [tokenizer.decode(row[:n]) for row, n in zip(rows.tokens_RS, rows.lengths_R, strict=True)]
        queries, documents = texts[:5], texts[5:]
        assert set(queries) == set(answers)
        for i, query in enumerate(queries):
            assert documents[i] in answers[query]
            assert rows.negative_BB[i].tolist() == [document not in answers[query] for document in documents]
        seen |= set(documents)
    assert seen == {f"{kind}{n}" for kind in "de" for n in range(4)}
    assert any(
        np.array_equal(a.tokens_RS, b.tokens_RS)
        for a, b in zip(drawn, batches(found, tokenizer, 5, 12, 0), strict=False)
    )
    assert next(batches(found, tokenizer, 2, 1, 0)).lengths_R.tolist() == [1] * 4


def test_examples_have_a_relevant_document() -> None:
    grades = {"what": {"c": 1, "b": 0}, "why": {"b": 2, "a": 1}, "none": {"a": 0}}
    found = examples(Collection({"a": "A", "b": "B", "c": "C"}, {"what": "x", "why": "y", "none": "z"}, grades))
    assert found == [Example("x", ("C",)), Example("y", ("B", "A"))]


def test_a_model_learns_to_find(run: Path, collection: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Queries of one letter, of which BM25 finds none: with their lesson, their documents rank first."""
    out = run.with_name("tuned")
    words = [f"data=[{collection}]", "batch_size=6", "length=8", "learning_rate=0.01", "steps=40"]
    assert execute(["retrieval", "tune", str(run), f"out={out}", *words]) == 0
    assert "step 40: loss 0." in capsys.readouterr().out
    assert execute(["retrieval", "eval", str(out), f"data=[{collection}]", "split=train"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    model, bm25, _ = (result["ndcg_10_texts"] for result in results)
    assert (model, bm25 < 0.8) == (1.0, True)
    with pytest.raises(ConversionError, match="already exists"):
        execute(["retrieval", "tune", str(run), f"out={out}", *words])
    with pytest.raises(UserError, match="batch_size=7: there are 6 queries"):
        execute(["retrieval", "tune", str(run), f"out={out}2", f"data=[{collection}]", "batch_size=7"])
