"""The sharing study: a lane is a run, what is kept of it, and its text."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.sharing_study import __main__ as study
from benchmarks.sharing_study import lanes
from benchmarks.sharing_study.cases import CASES, Case
from benchmarks.sharing_study.text import build, documents, of_html
from unipool_jax.config.compose import load_config
from unipool_jax.data.assets import demo_corpus_path
from unipool_jax.data.corpus import open_corpus
from unipool_jax.data.pipeline import WindowSource, training_batches
from unipool_jax.training.state import init_state
from unipool_jax.training.step import make_train_step

SMALL = (
    *("model.num_layers=2", "model.hidden_size=16", "model.ffn_size=16", "moe.experts_per_layer=2"),
    *("data.sequence_length=16", "train.batch_size=4", "train.microbatch_size=4", "train.steps=8"),
    *("loss.switch_group_sequences=4", "train.log_every=2", "train.eval_batch_size=64"),
)
CASE = Case("unipool", ("method=unipool", *SMALL))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `benchmarks.sharing_study.text` leaves it, of pieces of two addresses."""
    folder = tmp_path_factory.mktemp("text")
    with lzma.open(demo_corpus_path(), "rt", encoding="utf-8") as stream:
        mix, other = (json.loads(stream.readline())["text"] for _ in range(2))
    build(folder, [mix[at : at + 200] for at in range(0, 8_000, 200)], [other[:900]])
    return folder


@pytest.fixture(scope="module")
def out(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "LOG_EVERY", 2)
        study.run(CASE, [1, 2], text, out)
    return out


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_a_lane_is_a_run_and_what_is_kept_of_it(text: Path, out: Path) -> None:
    """The losses of each lane are those of the training step by itself on the batches of its seed."""
    for seed in (1, 2):
        config = CASE.config(text, seed)
        corpus = open_corpus(config.data, config.model.vocab_size)
        windows = WindowSource(corpus.stores, "train", 16, 8 * 4, seed)
        step, state = make_train_step(config), jax.jit(init_state, static_argnums=0)(config, jax.random.key(seed))
        losses = []
        for batch in training_batches(windows, batch_size=4, start_step=0, end_step=8):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss/lm"]))
        logged = [line["loss/lm"] for line in lines_of(out / "runs" / f"unipool-seed{seed}", "train")]
        np.testing.assert_allclose(logged, np.reshape(losses, (4, 2)).mean(axis=1), rtol=1e-6)
    run = out / "runs" / "unipool-seed2"
    assert [line["step"] for line in lines_of(run, "valid")] == [2, 4, 6, 8]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["results"]["valid"]["loss"] == lines_of(run, "valid")[-1]["loss"]
    assert summary["results"]["held_out"]["tokens"] > 0
    assert len(summary["results"]["valid"]["routing/zero_gates"]) == 2
    assert str(text) not in (run / "config.yaml").read_text(encoding="utf-8")
    assert load_config(run / "config.yaml").train.seed == 2


def test_a_finished_run_is_not_repeated(text: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    monkeypatch.setattr(study, "train", lambda *arguments: trained.extend(folder.name for folder in arguments[-1]))
    study.run(CASE, [1, 2, 3], text, out)
    assert trained == ["unipool-seed3"]


def test_every_case_is_a_valid_configuration(tmp_path: Path) -> None:
    for case in CASES:
        assert case.config(tmp_path).train.steps % lanes.LOG_EVERY == 0


def test_documents_are_taken_once_and_up_to_a_size() -> None:
    texts = [character * 300 for character in "abcab"]
    assert sorted(text[0] for text in documents(texts)) == ["a", "b", "c"]
    assert len(documents([*texts, "too short"], most_bytes=700)) == 2


def test_a_page_becomes_its_text() -> None:
    page = "<head><title>no</title></head><body><p>one  <b>two</b></p><script>x=1</script><p>three &lt;</p></body>"
    assert of_html(page) == "one two\nthree <"
