"""Evaluation against a plain sum over tokens, exact denominators, and the command line of eval.py."""

from __future__ import annotations

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import oracles
from runner import overrides
from unipool_jax.cli.main import execute, main
from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import Config, ConfigError
from unipool_jax.config.words import from_words
from unipool_jax.data.corpus import Corpus, open_corpus, open_texts
from unipool_jax.data.errors import DataError
from unipool_jax.data.pipeline import WindowSource
from unipool_jax.evaluation.requests import EvalRequest
from unipool_jax.parallel.mesh import usable_mesh
from unipool_jax.training import loop
from unipool_jax.training.checkpoint import CheckpointError, Checkpoints
from unipool_jax.training.evaluate import EvalResult, Evaluator, TextBatches, print_results, unigram_baseline
from unipool_jax.training.run_folder import RunError
from unipool_jax.training.sharding import replicated
from unipool_jax.training.state import TrainState, init_state

pytestmark = pytest.mark.usefixtures("steps_are_shared")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A trained model with checkpoints of steps 10 and 20."""
    folder = tmp_path_factory.mktemp("run")
    config = compose_config(overrides(folder, "train.steps=20", "train.checkpoint_every=10"))
    assert loop.train(config) == 0
    return config, folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def model(run: tuple[Config, Path]) -> tuple[Config, Corpus, TrainState]:
    config, folder = run
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        target = jax.eval_shape(lambda: init_state(config, jax.random.key(0)))
        state = TrainState(**checkpoints.restore(target._asdict()).items)
    return config, open_corpus(config.data, config.model.vocab_size), state


def _with(config: Config, *more: str) -> Config:
    data = config.data
    text = Path(data.files[0]).parent
    return compose_config(overrides(text, "train.steps=20", *more))


def _result(config: Config, corpus: Corpus, state: TrainState, limited: bool = False) -> EvalResult:
    evaluator = Evaluator(config, corpus, ["valid"], limited=limited)
    result = evaluator.evaluate(state.params, state.balance, evaluator.fixed("valid"))
    assert result is not None
    return result


def _stream(corpus: Corpus, split: Any) -> np.ndarray:
    (store,) = corpus.stores
    documents = store.split_documents(split)
    return np.concatenate(
        [store.read(int(store.document_offsets[d]), int(store.document_offsets[d + 1])) for d in documents]
    )


def test_denominators_are_every_token_and_byte_of_the_split(model: tuple[Config, Corpus, TrainState]) -> None:
    config, corpus, state = model
    stream = _stream(corpus, "valid")
    result = _result(config, corpus, state)
    assert result.tokens == len(stream) - 1
    assert result.bytes == int((stream[1:] < 256).sum())  # ids below 256 are bytes, the end of a document is none
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte == pytest.approx(result.loss * result.tokens / math.log(2) / result.bytes)


def test_the_loss_is_the_mean_over_tokens(model: tuple[Config, Corpus, TrainState]) -> None:
    """Against log-probabilities summed token by token in float64, from the logits of single windows."""
    from unipool_jax.model.transformer import forward

    config, corpus, state = model
    stream, length = _stream(corpus, "valid"), config.data.sequence_length
    apply = jax.jit(lambda tokens: forward(config, state.params, tokens, state.balance.expert_bias_GNE)[0])
    total, count = 0.0, 0
    for start in range(0, len(stream) - 1, length):
        window = stream[start : start + length + 1]
        inputs = np.zeros((1, length), np.int32)
        inputs[0, : len(window) - 1] = window[:-1]
        logits = np.asarray(apply(inputs), np.float64)[0, : len(window) - 1]
        highest = logits.max(axis=-1, keepdims=True)
        log_sums = np.log(np.exp(logits - highest).sum(axis=-1)) + highest[:, 0]
        total += float((log_sums - logits[np.arange(len(logits)), window[1:]]).sum())
        count += len(logits)
    result = _result(_with(config, "model.compute_dtype=float32"), corpus, state)
    assert result.loss == pytest.approx(total / count, rel=2e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 16, 1000])
@pytest.mark.parametrize("limited", [False, True])
def test_results_do_not_depend_on_the_batch_size(
    model: tuple[Config, Corpus, TrainState], batch_size: int, limited: bool
) -> None:
    config, corpus, state = model
    expected = _result(config, corpus, state, limited)
    found = _result(_with(config, f"train.eval_batch_size={batch_size}"), corpus, state, limited)
    assert (found.tokens, found.bytes) == (expected.tokens, expected.bytes)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    np.testing.assert_array_equal(found.counts_LE, expected.counts_LE)
    if limited:
        assert config.train.eval_batches is not None
        assert found.tokens == config.train.eval_batches * config.train.batch_size * config.data.sequence_length


def test_the_fixed_slice_repeats_and_the_moving_one_moves(model: tuple[Config, Corpus, TrainState]) -> None:
    config = _with(model[0], "train.eval_every=5", "train.eval_slice=moving")
    evaluator = Evaluator(config, model[1], ["valid"], limited=True)

    def targets(batches: Any) -> list[list[int]]:
        return [batch.targets.tolist() for batch in batches]

    assert targets(evaluator.fixed("valid")) == targets(evaluator.fixed("valid"))
    slices = [targets(evaluator.moving(j)) for j in range(5)]
    assert all(slices[0] != other for other in slices[1:])
    assert targets(evaluator.moving(2)) == slices[2]


def test_moving_slices_are_consecutive_windows_of_one_shuffled_split(model: tuple[Config, Corpus, TrainState]) -> None:
    """Evaluation j reads windows j n to (j + 1) n - 1; the order of windows is drawn for all evaluations at once."""
    config = _with(model[0], "train.eval_every=5", "train.eval_slice=moving", "train.eval_batch_size=3")
    evaluator = Evaluator(config, model[1], ["valid"], limited=True)
    assert config.train.eval_batches is not None
    size, evaluations = config.train.eval_batches * config.train.batch_size, 20 // 5 + 1
    length, seed = config.data.sequence_length, config.train.seed
    source = WindowSource(model[1].stores, "valid", length, size * evaluations, seed)
    for number in range(evaluations):
        batches = list(evaluator.moving(number))
        assert len(batches) == -(-size // 3)
        real = np.concatenate([batch.weights for batch in batches]).any(axis=1)
        assert real.sum() == size
        expected = source.batch(range(number * size, (number + 1) * size))
        for name in ("inputs", "targets", "weights"):
            found = np.concatenate([getattr(batch, name) for batch in batches])[real]
            np.testing.assert_array_equal(found, getattr(expected, name))


def test_a_moving_slice_is_used_in_training(
    model: tuple[Config, Corpus, TrainState], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, moving = [], Evaluator.moving

    def noted(evaluator: Evaluator, number: int) -> TextBatches:
        used.append(number)
        return moving(evaluator, number)

    monkeypatch.setattr(Evaluator, "moving", noted)
    config = _with(model[0], "train.eval_every=8", "train.eval_slice=moving", f"run.dir={tmp_path}")
    assert loop.train(config) == 0
    lines = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "valid"] == [8, 16, 20]
    # Each evaluation has its own, the one after the last step too, however few steps it follows the one before.
    assert used == [0, 1, 2]


def test_text_without_valid_and_test_is_refused(run: tuple[Config, Path]) -> None:
    with pytest.raises(RunError, match=r"valid and test are empty; use splits=\[train\]"):
        execute(["eval", f"run={run[1]}", "data.split=[1,0,0]"])


def test_evaluation_stops_when_asked(model: tuple[Config, Corpus, TrainState]) -> None:
    config, corpus, state = model
    evaluator = Evaluator(config, corpus, ["valid"], limited=False)
    assert evaluator.evaluate(state.params, state.balance, evaluator.fixed("valid"), lambda: True) is None


def test_without_exact_bytes_there_are_no_bits_per_byte(
    model: tuple[Config, Corpus, TrainState], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, corpus, state = model
    monkeypatch.setattr(corpus.tokenizer, "piece_bytes", None)
    result = _result(config, corpus, state)
    assert (result.bits_per_byte, result.bytes) == (None, None)
    assert json.loads(json.dumps(result.as_json()))["bits_per_byte"] is None
    print_results({"valid": result.as_json()}, {"valid": {"loss": 6.25, "bits_per_byte": None}})
    printed = capsys.readouterr().out
    assert "bits per byte: unknown" in printed
    assert re.search(r"loss of a unigram model\s+│\s+6\.2500", printed)


@pytest.fixture(scope="module")
def routed(model: tuple[Config, Corpus, TrainState]) -> np.ndarray:
    """Choices per layer and expert over every predicted token of the valid split, window by window, in NumPy."""
    config, corpus, state = model
    stream, length = _stream(corpus, "valid"), config.data.sequence_length
    total = np.zeros((config.model.num_layers, config.experts_per_pool), np.int64)
    bias = np.asarray(state.balance.expert_bias_GNE)
    for start in range(0, len(stream) - 1, length):
        inputs = stream[start : min(start + length, len(stream) - 1)]
        total += oracles.Forward(config, state.params, inputs[None], bias).counts()
    return total


_FOUR = ("mesh.data=2", "mesh.expert=2")


@pytest.mark.parametrize(
    ("batch_size", "mesh"), [(1, ()), (4, ()), (16, ()), (1000, ()), (16, _FOUR), (1000, _FOUR)], ids=str
)
def test_exactly_the_predicted_tokens_are_counted(
    model: tuple[Config, Corpus, TrainState], routed: np.ndarray, batch_size: int, mesh: tuple[str, ...]
) -> None:
    """Whatever the batch size: padding at the end of the last window, and rows of it, are routed but not counted."""
    config, corpus, state = model
    config = _with(config, "model.compute_dtype=float32", f"train.eval_batch_size={batch_size}", *mesh)
    devices = usable_mesh(config)
    with contextlib.nullcontext() if devices is None else jax.set_mesh(devices):
        evaluator = Evaluator(config, corpus, ["valid"], limited=False, mesh=devices)
        params, balance = state.params, state.balance
        if devices is not None:
            params, balance = jax.device_put((params, balance), replicated(devices))
        result = evaluator.evaluate(params, balance, evaluator.fixed("valid"))
    assert result is not None
    assert result.counts_LE.sum(axis=1).tolist() == [result.tokens] * config.model.num_layers
    np.testing.assert_array_equal(result.counts_LE, routed)


def test_micro_batches_of_training_do_not_limit_the_mesh(
    run: tuple[Config, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of 4 sequences do not divide over 8 devices, and no setting of the command could change that."""
    assert execute(["eval", f"run={run[1]}", "splits=[test]"]) == 0
    alone = _json(capsys)["test"]["loss"]
    assert execute(["eval", f"run={run[1]}", "splits=[test]", "mesh.data=8"]) == 0
    assert _json(capsys)["test"]["loss"] == pytest.approx(alone, rel=1e-3)


def test_the_unigram_model_by_hand(model: tuple[Config, Corpus, TrainState]) -> None:
    config, corpus, _ = model
    evaluator = Evaluator(config, corpus, ["valid"], limited=False)
    found = unigram_baseline(corpus, {"valid": evaluator.windows("valid")})
    assert found is not None
    train, valid = _stream(corpus, "train"), _stream(corpus, "valid")[1:]
    counts = np.bincount(train, minlength=257) + 1
    assert found["valid"]["loss"] == pytest.approx(float(-np.log(counts / counts.sum())[valid].mean()))


def test_a_split_without_text_is_named(model: tuple[Config, Corpus, TrainState], tmp_path: Path) -> None:
    text = tmp_path / "one.txt"
    text.write_text("only one document here", encoding="utf-8")
    config = model[0]
    corpus = open_texts(config.data, [str(text)], config.model.vocab_size)
    assert corpus.splits() == ["test"]
    with pytest.raises(DataError, match="valid"):
        Evaluator(config, corpus, ["valid"], limited=True)


def _json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])["results"]


def test_the_command_reports_valid_and_test(run: tuple[Config, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["eval", f"run={run[1]}"]) == 0
    newest = _json(capsys)
    assert list(newest) == ["valid", "test"]
    assert list(newest["valid"]) == ["loss", "perplexity", "bits_per_byte", "tokens", "bytes", "text"]
    assert execute(["eval", f"checkpoint={run[1] / 'checkpoints' / '20'}", "splits=[test]"]) == 0
    assert _json(capsys) == {"test": newest["test"]}
    assert execute(["eval", f"run={run[1].parent / 'latest'}", "step=10", "splits=[valid]"]) == 0
    assert _json(capsys)["valid"]["loss"] > newest["valid"]["loss"]


def test_the_command_evaluates_any_text_whole(
    run: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("pool expert naïve router " * 20, encoding="utf-8")
    assert execute(["eval", f"run={run[1]}", f"data.files=[{text}]", "train.eval_batch_size=2"]) == 0
    result = _json(capsys)
    assert list(result) == ["text"]
    # Bytes are tokens here. The first has no context and the end of the document is one more token without bytes.
    assert result["text"]["bytes"] == len(text.read_bytes()) - 1
    assert result["text"]["tokens"] == len(text.read_bytes())


def test_a_request_is_parsed() -> None:
    assert from_words(EvalRequest, []) == EvalRequest()
    assert from_words(EvalRequest, ["run=runs/a", "step=5", "splits=[test]", "train.eval_batch_size=4"]) == EvalRequest(
        run="runs/a", step=5, splits=("test",), overrides=(("train.eval_batch_size", 4),)
    )
    assert from_words(EvalRequest, ["model.compute_dtype=float32"]) == EvalRequest(
        overrides=(("model.compute_dtype", "float32"),)
    )
    assert from_words(EvalRequest, ["data.files=[a.txt,b.txt]", "kernels.implementation=xla"]) == EvalRequest(
        overrides=(("data.files", ("a.txt", "b.txt")), ("kernels.implementation", "xla"))
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["checkpont=x"], ["checkpont"]),
        (["train.steps=5", "model.num_layers=3"], ["train.steps", "model.num_layers"]),
        (["data.no_such=5"], ["data.no_such"]),
        (["step=first"], ["step"]),
        (["splits=[dev]"], ["splits"]),
        (["splits=[]"], ["splits"]),
        (["data.files=7"], ["data.files"]),
        (["latest", "latest"], ["latest"]),
        (["checkpoint=a/1", "step=1"], ["checkpoint"]),
        (["data.files=[a]", "splits=[test]"], ["data.files"]),
        (["step=[a"], ["step"]),
        (["run=a", "run.name=b"], ["run"]),
    ],
)
def test_what_is_not_understood_is_refused(arguments: list[str], named: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        from_words(EvalRequest, arguments)
    for name in named:
        assert name in str(error.value)


def test_what_cannot_be_evaluated_is_refused(
    run: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match="no run here"):
        execute(["eval", f"run={tmp_path}"])
    with pytest.raises(RunError, match="not a checkpoint"):
        execute(["eval", f"checkpoint={run[1]}"])
    with pytest.raises(CheckpointError, match=r"no complete checkpoint of step 7; choose one of \[10, 20\]"):
        execute(["eval", f"run={run[1]}", "step=7"])
    with pytest.raises(ConfigError, match=r"nothing\.txt"):
        execute(["eval", f"run={run[1]}", "data.files=[nothing.txt]"])
    assert main(["eval", "nonsense=1"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_another_tokenizer_is_refused(run: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    meta = Checkpoints.meta
    monkeypatch.setattr(Checkpoints, "meta", lambda self, step: meta(self, step) | {"tokenizer_sha256": "0" * 64})
    with pytest.raises(RunError, match=r"data\.tokenizer=bytes"):
        execute(["eval", f"run={run[1]}"])


def test_the_default_run_is_the_latest_below_runs(
    run: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run[1].parent.parent)
    assert execute(["eval"]) == 0
    assert list(_json(capsys)) == ["valid", "test"]


def test_all_splits_have_one_batch_shape(model: tuple[Config, Corpus, TrainState]) -> None:
    evaluator = Evaluator(model[0], model[1], ["valid", "test"], limited=False)
    batches = [*evaluator.fixed("valid"), *evaluator.fixed("test")]
    assert len({batch.inputs.shape for batch in batches}) == 1
