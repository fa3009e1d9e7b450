"""data.document_mask: a document in a packed row is read as if it were alone, wherever rows are made."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from runner import final_state, overrides
from test_megatron import documents, write_pair
from tiny import END, tiny_config, tiny_state
from unipool_jax.analysis.compare import check_slices, grouped, load_run
from unipool_jax.cli.main import execute
from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import Config
from unipool_jax.data.corpus import open_corpus
from unipool_jax.data.documents import segment_ids
from unipool_jax.data.errors import DataError
from unipool_jax.data.pipeline import Batch, EvalWindows, WindowSource
from unipool_jax.data.token_store import build_store
from unipool_jax.data.tokenizer import load_tokenizer
from unipool_jax.evaluation.requests import EvalRequest
from unipool_jax.evaluation.scoring import LanguageModel, Window, score_windows
from unipool_jax.evaluation.text import evaluate_text
from unipool_jax.model import documents as on_devices
from unipool_jax.model.sampling import Sampling, generate
from unipool_jax.model.transformer import empty_cache, forward, forward_cached
from unipool_jax.parallel.mesh import make_mesh
from unipool_jax.planner import compilation
from unipool_jax.training import loop
from unipool_jax.training.run_folder import RunError
from unipool_jax.training.sharding import state_shardings, to_devices
from unipool_jax.training.state import TrainState
from unipool_jax.training.step import make_eval_step, make_train_step

pytestmark = pytest.mark.filterwarnings("ignore:NormRouter over")

LENGTHS = [(3, 1, 7, 5), (9, 7), (1, 1, 14), (16,)]
"""Of the documents of each row; the last of a row is cut by its end."""
SWITCH = ("attention.kind=switch", "attention.window=4")
ALTERNATING = ("attention.kind=alternating", "attention.window=4", "attention.full_layers=[2]")


@functools.cache
def model(method: str = "unipool", *more: str) -> tuple[Config, TrainState]:
    config = tiny_config(method, "data.sequence_length=16", "data.document_mask=true", *more)
    return config, tiny_state(config)


def packed() -> tuple[np.ndarray, list[list[slice]]]:
    """Tokens `[4, 16]`, and where the documents of each row lie."""
    random = np.random.default_rng(0)
    tokens_BS = random.integers(1, 64, (4, 16), dtype=np.int32)
    places = []
    for row, lengths in enumerate(LENGTHS):
        ends = np.cumsum(lengths)
        tokens_BS[row, ends[:-1] - 1] = END
        places.append([slice(end - length, end) for end, length in zip(ends, lengths, strict=True)])
    return tokens_BS, places


def packed_batch(tokens_BS: np.ndarray) -> Batch:
    targets_BS = np.random.default_rng(1).integers(0, 64, tokens_BS.shape, dtype=np.int32)
    return Batch(tokens_BS, targets_BS, np.ones(tokens_BS.shape, np.float32), segment_ids(tokens_BS, END))


def test_segments_and_positions() -> None:
    tokens = np.array([[5, 0, 6, 7, 0, 0, 8], [0, 5, 5, 5, 5, 5, 0]], np.int32)
    wanted = [[1, 1, 2, 2, 2, 3, 4], [1, 2, 2, 2, 2, 2, 2]]
    found = segment_ids(tokens, END)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(on_devices.segment_ids(jnp.asarray(tokens), END), wanted)
    positions = on_devices.document_positions(jnp.asarray(found))
    np.testing.assert_array_equal(positions, [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5]])
    # One document, and ids that are equal at both ends of a row.
    np.testing.assert_array_equal(
        on_devices.document_positions(jnp.asarray([[1, 1, 1], [4, 2, 4]])), [[0, 1, 2], [0, 0, 0]]
    )
    np.testing.assert_array_equal(segment_ids(tokens[:1], END, np.arange(7) < 3), [[1, 1, 2, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("unipool", ("moe.top_k=2",)),
        ("vanilla_aux_free", ("model.num_kv_heads=1",)),
        ("unipool", ALTERNATING),
        ("vanilla", SWITCH),
    ],
)
def test_logits_are_those_of_each_document_alone_in_numpy(method: str, more: tuple[str, ...]) -> None:
    config, state = model(method, *more)
    tokens_BS, places = packed()
    run = jax.jit(forward, static_argnums=0)
    bias = np.random.default_rng(1).normal(size=state.balance.expert_bias_GNE.shape, scale=0.05).astype(np.float32)
    found, stats = run(config, state.params, tokens_BS, bias, None, segment_ids(tokens_BS, END))
    own_bias = bias if config.loss.balance == "expert_bias" else None
    counts: Any = 0
    for row, parts in enumerate(places):
        for part in parts:
            alone = oracles.Forward(config, state.params, tokens_BS[row : row + 1, part], own_bias)
            np.testing.assert_allclose(found[row, part], alone.logits[0], rtol=1e-3, atol=2e-4)
            counts = counts + alone.counts()
    # Routing is token by token: statistics are those of the documents together.
    np.testing.assert_array_equal(np.asarray(stats.counts_AE).sum(2).reshape(config.model.num_layers, -1), counts)
    # Without the mask the same tokens give other logits, from the second document on.
    crossed = run(config, state.params, tokens_BS, bias)[0]
    np.testing.assert_allclose(crossed[0, :3], found[0, :3], rtol=1e-4, atol=1e-5)
    assert np.abs(crossed[0, 3:] - found[0, 3:]).max(axis=-1).min() > 1e-3
    np.testing.assert_allclose(crossed[3], found[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_are_sums_over_documents(remat: str) -> None:
    config, state = model("unipool", f"model.remat={remat}")
    tokens_BS, places = packed()
    parts = [(row, part) for row, slices in enumerate(places) for part in slices]
    cotangent = np.zeros((len(parts), 16, 64), np.float32)
    cotangent[:4] = np.random.default_rng(2).normal(size=(4, 16, 64))
    # Each document in a row of its own, with padding behind it that no gradient reaches.
    rows, weights = np.zeros((len(parts), 16), np.int32), np.zeros_like(cotangent)
    for number, (row, part) in enumerate(parts):
        size = part.stop - part.start
        rows[number, :size], weights[number, :size] = tokens_BS[row, part], cotangent[row, part]
    tokens_BS = np.pad(tokens_BS, ((0, len(parts) - 4), (0, 0)))

    @jax.jit
    def gradient(params: Any, tokens: Any, weights: Any, segments: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.sum(forward(config, params, tokens, state.balance.expert_bias_GNE, None, segments)[0] * weights)

        return jax.grad(loss)(params)

    together = gradient(state.params, tokens_BS, cotangent, segment_ids(tokens_BS, END))
    alone = gradient(state.params, rows, weights, np.ones_like(rows))
    for mine, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=1e-4 * float(np.abs(theirs).max()))


@pytest.fixture(scope="module")
def steps() -> tuple[Config, TrainState, Batch, Any]:
    """A step of two micro-batches on one device."""
    config, state = model("unipool", "train.batch_size=8", "train.microbatch_size=4", "mesh.capacity_factor=8")
    tokens_BS = packed()[0]
    batch = packed_batch(np.concatenate([tokens_BS, tokens_BS[::-1]]))
    return config, state, batch, jax.device_get(make_train_step(config)(jax.tree.map(jnp.copy, state), batch))


def test_a_step_knows_the_documents_of_its_micro_batches(steps: Any) -> None:
    config, state, batch, (_, metrics) = steps
    assert batch.segments is not None
    losses = []
    for row in range(8):
        ends = np.flatnonzero(np.diff(batch.segments[row])) + 1
        for part in np.split(np.arange(16), ends):
            forward_alone = oracles.Forward(config, state.params, batch.inputs[row : row + 1, part])
            losses.append(len(part) * forward_alone.lm_loss(batch.targets[row : row + 1, part]))
    assert metrics["loss/lm"] == pytest.approx(np.sum(losses) / 128, rel=1e-5)
    evaluated = make_eval_step(config)(state.params, state.balance, batch, jnp.zeros(64, jnp.int32))
    assert float(np.sum(evaluated.loss_B)) == pytest.approx(np.sum(losses), rel=1e-5)


def test_a_mesh_changes_nothing(steps: Any) -> None:
    config, state, batch, (alone, single) = steps
    mesh = make_mesh(compose_config(["mesh.data=2", "mesh.fsdp=2"]).mesh, jax.devices()[:4])
    with jax.set_mesh(mesh):
        step = make_train_step(config, mesh)
        placed = jax.device_put(state, state_shardings(config, mesh, state))
        found, metrics = step(placed, to_devices(mesh, batch, 8))
    assert float(metrics["loss/lm"]) == pytest.approx(float(single["loss/lm"]), rel=1e-5)
    for mine, theirs in zip(jax.tree.leaves(found.opt_state), jax.tree.leaves(alone.opt_state), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=5e-6)
    # What is compiled ahead of time has the same arrays.
    planned = compilation._batch(config, 8, mesh)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), planned) == jax.tree.map(lambda x: (x.shape, x.dtype), batch)


def test_sampling_reads_a_prompt_as_a_document() -> None:
    """Cached tokens see those after the last end, at positions that count from there."""
    config, state = model()
    lengths_B, end = np.array([6, 3, 1], np.int32), END
    prompts_BS = np.array([[9, 8, end, 7, 6, 5], [1, 2, 3, 4, 4, 4], [end, 4, 4, 4, 4, 4]], np.int32)
    bias, key = state.balance.expert_bias_GNE, jax.random.key(0)
    options = Sampling(64, end, 8, temperature=0.0)
    found = jax.device_get(generate(config, state.params, bias, prompts_BS, lengths_B, key, options))
    run = jax.jit(forward, static_argnums=0)
    logits_BTV = run(config, state.params, found.tokens_BT, bias, None, segment_ids(found.tokens_BT, end))[0]
    for tokens, logits, first, last in zip(found.tokens_BT, logits_BTV, lengths_B, found.lengths_B, strict=True):
        np.testing.assert_array_equal(tokens[first:last], np.asarray(logits)[first - 1 : last - 1].argmax(-1))
    # The same, logit by logit, in one piece and token by token.
    tokens_BS = packed()[0]
    segments = segment_ids(tokens_BS, end)
    wanted = run(config, state.params, tokens_BS, bias, None, segments)[0]
    advance = jax.jit(functools.partial(forward_cached, config, state.params))
    cache = empty_cache(config, 4, 16)
    start, cache = advance(tokens_BS[:, :10], bias, cache, np.zeros(4, np.int32), None, segments)
    np.testing.assert_allclose(start, wanted[:, :10], rtol=1e-3, atol=1e-4)
    # Scores depend on differences of positions alone; that they begin anew shows in the keys.
    again = np.broadcast_to(np.roll(tokens_BS[0], -4)[:10], (4, 10))
    alone = advance(again, bias, empty_cache(config, 4, 16), np.zeros(4, np.int32), None, np.ones_like(tokens_BS))[1]
    np.testing.assert_allclose(
        cache.key_LBTHC[:, 0, 4:10],
        alone.key_LBTHC[:, 0, :6],
        rtol=1e-3,
        atol=1e-4 * float(jnp.abs(alone.key_LBTHC).max()),
    )
    for at in range(10, 13):
        one, cache = advance(tokens_BS[:, at : at + 1], bias, cache, np.full(4, at, np.int32), None, segments)
        np.testing.assert_allclose(one[:, 0], wanted[:, at], rtol=1e-3, atol=1e-4)


def test_scores_are_those_of_documents() -> None:
    """An empty context is an end token, which ends the document before; texts with ends in them are several."""
    tokenizer = load_tokenizer("bytes")
    config, state = model("unipool", "model.vocab_size=257")
    text = np.array([*b"abc", tokenizer.eod, *b"de"], np.int32)
    windows = [Window([tokenizer.eod], text), Window(text[:2], text[2:])]
    found = score_windows(LanguageModel(config, state.params, state.balance, tokenizer), windows).log_likelihood_W

    def log_likelihood(document: list[int], targets: list[int], scored: int) -> float:
        """Of the last `scored` targets, each after the tokens of its document."""
        logits = oracles.Forward(config, state.params, np.array([document])).logits[0]
        return float(np.log(oracles.softmax(logits))[np.arange(len(targets)), targets][-scored:].sum())

    end, (a, b, c, _, d, e) = tokenizer.eod, text.tolist()
    wanted = log_likelihood([end], [a], 1) + log_likelihood([a, b, c, end], [b, c, end, d], 4)
    assert found[0] == pytest.approx(wanted + log_likelihood([d], [e], 1), rel=1e-4)
    wanted = log_likelihood([a, b, c, end], [b, c, end, d], 3) + log_likelihood([d], [e], 1)
    assert found[1] == pytest.approx(wanted, rel=1e-4)


def test_windows_tell_the_documents_that_the_store_knows(tmp_path: Path) -> None:
    """By the offsets of documents, not by their end tokens; windows and weights are what they were."""
    compose_config(overrides(tmp_path))
    store = build_store([tmp_path / "text.jsonl"], tmp_path / "store", "bytes", (3, 1, 0), progress=False)
    masked, plain = (WindowSource(store, "train", 50, 90, 7, document_mask=mask) for mask in (True, False))
    assert masked.fingerprint() == plain.fingerprint()
    batch, before = masked.batch(range(90)), plain.batch(range(90))
    assert before.segments is None
    for mine, theirs in zip(batch[:3], before[:3], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    windows = masked._store_windows(0)
    lengths = store.document_lengths(windows.stream._documents)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    starts = windows.order[:90].astype(int) * 50
    wanted = np.stack([1 + owner[start : start + 50] - owner[start] for start in starts])
    np.testing.assert_array_equal(batch.segments, wanted)
    assert wanted.max() >= 2

    evaluated = EvalWindows(store, "valid", 50, document_mask=True)
    rows = evaluated.batch(range(len(evaluated)))
    assert rows.segments is not None
    np.testing.assert_array_equal(rows.segments > 0, rows.weights > 0)
    owner = np.repeat(np.arange(store.num_documents), store.document_lengths(np.arange(store.num_documents)))
    stream = owner[owner >= store.split_documents("valid")[0]][: evaluated.num_targets]
    assert [len(set(stream[i : i + 50])) for i in range(0, len(stream), 50)] == rows.segments.max(axis=1).tolist()


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with documents apart; documents are cut to be shorter than its windows."""
    place = tmp_path_factory.mktemp("masked")
    lines = [json.dumps({"text": f"document {number} " * (1 + number % 2)}) for number in range(60)]
    (place / "text.jsonl").write_text("\n".join(lines))
    words = ["train.steps=6", "data.document_mask=true", "train.eval_every=3", "train.eval_slice=moving"]
    assert loop.train(compose_config(overrides(place, "data.sequence_length=48", *words))) == 0
    return place / "runs" / "tiny"


def test_a_run_keeps_documents_apart_wherever_it_reads(masked: Path) -> None:
    """Evaluation of a split and of a file against NumPy, document by document; the mask cannot change in between."""
    request = EvalRequest(run=str(masked), splits=("valid",))
    config, found = evaluate_text(request).config, evaluate_text(request).results["valid"]
    corpus = open_corpus(config.data, config.model.vocab_size)
    state = final_state(config, masked)
    params = nested({name: value for name, value in state.items() if name.startswith("['params']")})["params"]
    windows = EvalWindows(corpus.stores, "valid", 48, document_mask=True)
    batch, total = windows.batch(range(len(windows))), 0.0
    assert batch.segments is not None
    for inputs, targets, segments in zip(batch.inputs, batch.targets, batch.segments, strict=True):
        for segment in set(segments[segments > 0].tolist()):
            own = segments == segment
            total += own.sum() * oracles.Forward(config, params, inputs[None, own]).lm_loss(targets[None, own])
    assert found.loss == pytest.approx(total / windows.num_targets, rel=1e-5)
    crossed = evaluate_text(EvalRequest(run=str(masked), splits=("valid",), overrides=(("data.document_mask", False),)))
    assert abs(crossed.results["valid"].loss - found.loss) > 1e-4
    assert crossed.results["valid"].text == found.text  # the same targets

    with pytest.raises(RunError, match=r"data\.document_mask: True there, False now"):
        execute(["train", str(masked), "data.document_mask=false"])
    run = load_run(str(masked))
    other = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, document_mask=False))
    pair = [run, dataclasses.replace(run, config=other)]
    check_slices(pair)
    assert len(grouped(pair)) == 2


def nested(arrays: dict[str, np.ndarray]) -> Any:
    """`['a']['b']` -> `{"a": {"b": ...}}`."""
    tree: Any = {}
    for name, array in arrays.items():
        *path, last = re.findall(r"'([^']+)'", name)
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = array
    return tree


def test_a_store_without_ends_is_refused(tmp_path: Path) -> None:
    made = documents()
    write_pair(tmp_path / "good", made)
    write_pair(tmp_path / "bad", [document[:-1] for document in made])

    def opened(name: str, mask: str) -> Any:
        words = [f"data.stores=[{tmp_path / name}]", "data.tokenizer=bytes", f"data.document_mask={mask}"]
        return open_corpus(compose_config(["data=pile", *words]).data, 512)

    opened("good", "true")
    opened("bad", "false")
    with pytest.raises(DataError, match=r"data.document_mask=true: .*bad: .* end-of-document token 256 .*--append-eod"):
        opened("bad", "true")
