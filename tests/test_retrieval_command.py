"""Embeddings of texts, and `unipool retrieval eval`."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tiny import tiny_config, tiny_state
from unipool_jax.cli.main import execute
from unipool_jax.config.errors import UserError
from unipool_jax.config.files import FileError
from unipool_jax.config.schema import ConfigError
from unipool_jax.convert.runs import as_numpy, write_run
from unipool_jax.data.tokenizer import load_tokenizer
from unipool_jax.evaluation.scoring import LanguageModel
from unipool_jax.model.transformer import apply
from unipool_jax.moe.lock import Candidate
from unipool_jax.retrieval.command import summarize
from unipool_jax.retrieval.embedding import embed, hidden_states, pool
from unipool_jax.retrieval.folder import Collection, make_index, write_collection
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
    write_collection(folder, Collection(texts, queries, {f"q{name}": {name: 1} for name in "abc"}))
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
