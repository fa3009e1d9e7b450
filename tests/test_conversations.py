"""data.source=conversations: which tokens a model reads, and which of them it learns."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runner import assert_same, final_state, overrides
from tiny import tiny_batch, tiny_config, tiny_state
from unipool_jax.chat import command
from unipool_jax.chat.answering import Answerer
from unipool_jax.chat.requests import ChatRequest
from unipool_jax.cli.main import execute
from unipool_jax.config.compose import compose_config
from unipool_jax.config.rules import validate
from unipool_jax.config.schema import Config, ConfigError
from unipool_jax.data.conversation_store import ConversationStore, conversation_store, pack, pack_conversations
from unipool_jax.data.conversations import Example, Exchange, read_examples
from unipool_jax.data.errors import DataError
from unipool_jax.data.pipeline import EvalWindows, WindowSource
from unipool_jax.data.templates import load_template
from unipool_jax.data.tokenizer import ByteTokenizer
from unipool_jax.data.unigram import token_counts
from unipool_jax.evaluation.requests import EvalRequest
from unipool_jax.evaluation.tasks_command import open_model
from unipool_jax.model.transformer import LayerInputs, Positions, Selection, apply, forward
from unipool_jax.training import loop
from unipool_jax.training.run_folder import RunError
from unipool_jax.training.state import TrainState

END = 256
BYTES = ByteTokenizer()

pytestmark = pytest.mark.usefixtures("steps_are_shared")

CHAT = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "two"},
    ]
}


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def ids(text: str) -> list[int]:
    return list(text.encode())


def sums(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(count) for b in range(5)]


def store_of(path: Path, size: int, template: str = "prompt", split: tuple[int, ...] = (1, 0, 0)) -> ConversationStore:
    packed = pack_conversations([path], template, size, BYTES)
    return conversation_store([path], packed, BYTES, split, "contiguous")


def test_each_response_is_an_example_with_all_before_it(tmp_path: Path) -> None:
    path = written(tmp_path, CHAT, {"prompt": "p", "response": "x"})
    found = read_examples([path], "plain", BYTES)
    first = "system:\ns\n\nuser:\nq\n\nassistant:\n"
    assert [(example.prompt.tolist(), example.response.tolist()) for example in found] == [
        (ids(first), [*ids("one"), END]),
        (ids(first + "one\n\nuser:\nr\n\nassistant:\n"), [*ids("two"), END]),
        (ids("user:\np\n\nassistant:\n"), [*ids("x"), END]),
    ]
    chatml = load_template("chatml")(CHAT["messages"][:2])
    assert chatml == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_is_data(tmp_path: Path) -> None:
    """The sandbox keeps a template from Python's attributes and from changing what it is given."""
    for source, message in [
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% set _ = messages.append(1) %}", "append"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[9].content.x }}", "no element 9"),
    ]:
        path = tmp_path / "template.jinja"
        path.write_text(source)
        with pytest.raises(DataError, match=message):
            load_template(str(path))([{"role": "user", "content": "q"}])
    path.write_text("{% for %}")
    with pytest.raises(DataError, match=r"data\.template=.*template\.jinja"):
        load_template(str(path))
    with pytest.raises(DataError, match="none of prompt, plain, chatml"):
        load_template("alpaca")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "x"}, r"line 2: neither"),
        ({"prompt": "x", "response": 3}, r"line 2: neither"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"line 2: no message of the role 'assistant'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, r"line 2: begins with a message of the role"),
        ({"prompt": "", "response": "x"}, r"line 2: data.template=prompt makes an empty prompt"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_examples([written(tmp_path, {"prompt": "a", "response": "b"}, line)], "prompt", BYTES)


def test_packs_are_a_best_fit_and_hold_every_example_once() -> None:
    assert pack([5, 3, 4, 2, 1, 8], 8) == [[0, 1], [2, 3, 4], [5]]
    lengths = np.random.default_rng(0).integers(1, 33, 500).tolist()
    packs = pack(lengths, 32)
    assert sorted(index for members in packs for index in members) == list(range(500))
    assert max(sum(lengths[index] for index in members) for members in packs) <= 32
    assert len(packs) <= 1.1 * sum(lengths) / 32


def test_counted_targets_by_hand(tmp_path: Path) -> None:
    """Two examples and padding in the first sequence, one in the second: inputs, targets and weights of each window."""
    pairs = [("ab", "c"), ("d", "ef"), ("ghijk", "l")]
    path = written(tmp_path, *({"prompt": prompt, "response": response} for prompt, response in pairs))
    store = store_of(path, 9)
    tokens = [*ids("abc"), END, *ids("def"), END, END, *ids("ghijkl"), END, END, END]
    assert store.read(0, 18).tolist() == tokens
    batch = EvalWindows(store, "train", 9, document_mask=True).batch([0, 1])
    assert batch.inputs.tolist() == [tokens[:9], [*tokens[9:17], 0]]
    assert batch.targets[0].tolist() == tokens[1:10]
    # Targets are one later than inputs: c and its end, e, f and their end; not the padding, nor the next prompt.
    assert batch.weights.tolist() == [[0, 1, 1, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0, 0]]
    assert batch.segments is not None
    assert batch.segments[0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert np.flatnonzero(EvalWindows(store, "train", 9).target_counts()).tolist() == [*ids("cefl"), END]
    assert (token_counts([store], "train") == EvalWindows(store, "train", 9).target_counts()).all()


def test_windows_are_packs_in_every_epoch(tmp_path: Path) -> None:
    """Shuffled, over several epochs, no window cuts an example, and each response counts as often as any other."""
    path = written(tmp_path, *sums(8))
    store = store_of(path, 16)
    packs = store.read(0, store.num_tokens).reshape(-1, 16)
    source = WindowSource(store, "train", 16, 3 * len(packs), seed=5, document_mask=True)
    batch = source.batch(range(3 * len(packs)))
    assert {row.tobytes() for row in batch.inputs} == {row.tobytes() for row in packs}
    counted = batch.weights > 0
    for row, weights in zip(batch.inputs, counted, strict=True):
        text = BYTES.decode(row[1:][weights[:-1]])
        expected = [example for example in BYTES.decode(row).split("<|endoftext|>") if example]
        assert text == "".join(example.split("=")[1] + "<|endoftext|>" for example in expected)[: len(text)]
    first, again = WindowSource(store, "train", 16, 9, seed=5), WindowSource(store_of(path, 16), "train", 16, 9, seed=5)
    assert first.fingerprint() == again.fingerprint()


def test_the_fingerprint_knows_what_counts(tmp_path: Path) -> None:
    one = store_of(written(tmp_path, {"prompt": "ab", "response": "c"}), 8)
    other = store_of(written(tmp_path, {"prompt": "a", "response": "bc"}), 8)
    assert one.read(0, 8).tolist() == other.read(0, 8).tolist()
    assert one.fingerprint() != other.fingerprint()


def test_too_long_examples_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, {"prompt": "ab", "response": "c"}, {"prompt": "x" * 9, "response": "c"})
    assert store_of(path, 4).num_documents == 1
    assert "1 of 2 responses left out" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"every response is longer.*data\.sequence_length=3"):
        store_of(path, 3)


def test_what_does_not_count_has_no_gradient() -> None:
    """The derivative of the loss with respect to the logits of a target of weight 0 is 0, and of another is not."""
    config = tiny_config("dense")
    state, batch = tiny_state(config), tiny_batch(config)
    weights = np.ones(batch.weights.shape, np.float32)
    weights[:, ::2] = 0

    def of(params: Any, targets: np.ndarray) -> jax.Array:
        inputs = LayerInputs(Selection(state.balance.expert_bias_GNE, None))
        output = apply(config, params, batch.inputs, inputs, Positions())
        return output.head.weighted_loss(jnp.asarray(targets), jnp.asarray(weights))

    gradient = jax.jit(jax.grad(of))

    other = np.where(weights > 0, batch.targets, (batch.targets + 1) % config.model.vocab_size)
    counted = np.where(weights > 0, (batch.targets + 1) % config.model.vocab_size, batch.targets)
    same, changed, base = (gradient(state.params, targets) for targets in (other, counted, batch.targets))
    assert all(map(np.array_equal, jax.tree.leaves(same), jax.tree.leaves(base)))
    assert not any(map(np.array_equal, jax.tree.leaves(changed), jax.tree.leaves(base)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on text, and one of six steps on sums that starts from it."""
    place = tmp_path_factory.mktemp("conversations")
    written(place, *sums(8))
    assert (
        loop.train(compose_config(overrides(place, "run.name=text", "data.document_mask=true", "train.steps=6"))) == 0
    )
    assert loop.train(chats(place)) == 0
    return place


def chats(folder: Path, *more: str) -> Config:
    """The configuration of a tiny run on the conversations in `folder`."""
    words = [word for word in overrides(folder) if not word.startswith(("data.files", "data.source"))]
    words += ["data=conversations", f"data.files=[{folder / 'chats.jsonl'}]", "data.template=prompt"]
    start = f"run.init_from={folder / 'runs' / 'text'}"
    return compose_config([*words, start, "train.steps=6", *more])


def test_a_run_resumes_bit_for_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by a signal after three of six steps it goes on bit for bit; another template is another text."""
    whole, stopped = chats(folder), chats(folder, "run.name=resumed")
    shared = loop.make_train_step

    def make(config: Config, mesh: Any) -> Any:
        train_step = shared(config, mesh)

        def step(state: TrainState, batch: Any) -> Any:
            state, metrics = train_step(state, batch)
            if int(jax.device_get(state.step)) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return state, metrics

        return step

    monkeypatch.setattr(loop, "make_train_step", make)
    assert loop.train(stopped) != 0
    monkeypatch.undo()
    assert loop.train(stopped) == 0
    assert_same(final_state(whole, folder / "runs" / "tiny"), final_state(stopped, folder / "runs" / "resumed"))
    with pytest.raises(RunError, match=r"data\.template: 'prompt' there, 'plain' now"):
        loop.train(chats(folder, "run.name=resumed", "data.template=plain"))


def test_answers_are_exactly_right_or_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted against greedy decoding by whole forward passes, on references that are its own answers or are not."""
    run = folder / "runs" / "tiny"
    model = open_model(EvalRequest(str(run)))[0]
    read = jax.jit(functools.partial(forward, model.config))
    lines = []
    for number, prompt in enumerate(("1+1=", "2+3=", "44+1=")):
        tokens = ids(prompt)
        for _ in range(4):
            padded = np.array([tokens + [0] * (16 - len(tokens))])
            logits, _ = read(model.params, padded, model.balance.expert_bias_GNE)
            tokens.append(int(np.argmax(logits[0, len(tokens) - 1, :257])))
            if tokens[-1] == END:
                break
        answer = tokens[len(prompt) :]
        lines.append((prompt, answer if number else [*answer[:-1], (answer[-1] + 1) % 256]))
    examples = [
        Example(np.array(ids(prompt), np.int32), np.array(answer, np.int32), Exchange((), "", ""))
        for prompt, answer in [*lines, ("x" * 13, [1])]
    ]
    monkeypatch.setattr(command, "read_examples", lambda *_: examples)
    out = folder / "answers.jsonl"
    words = ["answers", str(run), f"files=[{folder / 'chats.jsonl'}]", "max_tokens=4", f"out={out}"]
    assert execute(words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["exact_match"], found["questions"], found["not_answered"]) == (0.5, 4, 1)
    assert found["low"] < 0.5 < found["high"]
    written_lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["right"] for line in written_lines] == [False, True, True, False]
    assert written_lines[3]["answer"] is None
    with pytest.raises(ConfigError, match="max_tokens=16: the model reads 16 positions"):
        execute([*words[:3], "max_tokens=16"])


def test_a_chat_keeps_what_was_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said, seen = iter(["1+1=", "12345678901234", "/new", "2+2=", ""]), []

    def drawn(_: Answerer, prompts: list[np.ndarray]) -> list[np.ndarray | None]:
        seen.append(BYTES.decode(prompts[0]))
        return [None if len(prompts[0]) > 12 else np.array([*ids("2"), END], np.int32)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Answerer, "answers", drawn)
        request = ChatRequest(str(folder / "runs" / "tiny"), max_tokens=4)
        assert command.chat_command(request, lambda _: next(said)) == 0
    assert seen == ["1+1=", "12345678901234", "2+2="]
    output = capsys.readouterr().out
    assert output.count("\n2\n") == 2
    assert "this makes 14 tokens, and there is room for 12; /new begins anew" in output


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"data\.files=\[\]: data\.source=conversations needs at least one"):
        validate(compose_config(["data=conversations"]))
