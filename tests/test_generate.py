"""The command line of `unipool generate`."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from runner import overrides
from unipool_jax.cli.main import execute, main
from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import Config, ConfigError, DataConfig
from unipool_jax.config.words import from_words
from unipool_jax.data.tokenizer import load_tokenizer
from unipool_jax.evaluation.generate import encode_prompts, generate_texts
from unipool_jax.evaluation.requests import GenerateRequest
from unipool_jax.model.transformer import forward
from unipool_jax.training import loop
from unipool_jax.training.checkpoint import CheckpointError, Checkpoints, restore_model
from unipool_jax.training.run_folder import RunError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on bytes with 16 positions."""
    place = tmp_path_factory.mktemp("generate")
    assert loop.train(compose_config(overrides(place, "train.steps=10"))) == 0
    return place / "runs" / "tiny"


def test_every_setting_is_read_and_a_prompt_is_literal() -> None:
    words = ["run=a/b", "prompt=1: [x] = ü", "prompt=two", "step=5", "max_tokens=3", "temperature=0.5", "top_p=1"]
    assert from_words(GenerateRequest, [*words, "seed=9"]) == GenerateRequest(
        "a/b", ("1: [x] = ü", "two"), 5, 3, 0.5, 1.0, 9
    )
    assert from_words(GenerateRequest, ["prompt=x"]) == GenerateRequest(prompt=("x",))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("prompt=", "prompt=: empty"),
        ("top_p=0", "top_p=0: must be more than 0 and at most 1"),
        ("top_p=1.5", "top_p=1.5"),
        ("top_p=nan", "top_p=nan"),
        ("temperature=-1", "temperature=-1: must be at least 0"),
        ("temperature=inf", "temperature=inf"),
        ("max_tokens=0", "max_tokens=0: must be at least 1"),
        ("max_tokens=two", "max_tokens='two': expected a whole number"),
        ("seed=-1", "seed=-1"),
        ("seed=4294967296", "seed=4294967296"),
        ("step=1.5", "step=1.5"),
        ("run=", "run=: empty"),
        ("top_k=3", "top_k=3: not understood"),
        ("run.name=x", "run.name=x: not a setting that can be replaced here; use run=, prompt=,"),
    ],
)
def test_a_bad_word_is_named_and_all_are_reported(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_words(GenerateRequest, ["prompt=text", word, "max_tokens=-7"])
    text = str(caught.value)
    assert message in text
    assert "max_tokens=-7" in text


def test_without_a_prompt() -> None:
    with pytest.raises(ConfigError, match="prompt=: no text"):
        from_words(GenerateRequest, [])


def test_no_run_no_step_and_too_many_positions(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run here"):
        generate_texts(GenerateRequest(str(tmp_path / "missing"), ("x",)))
    with pytest.raises(CheckpointError, match="step 3"):
        generate_texts(GenerateRequest(str(folder), ("x",), step=3))
    with pytest.raises(
        ConfigError, match=r"prompt='a{9}'.*max_tokens=8.*1 to 8.*16 positions \(data.sequence_length\)"
    ):
        generate_texts(GenerateRequest(str(folder), ("a" * 8, "a" * 9), max_tokens=8))
    assert main(["generate", f"run={folder}", "prompt=x", "max_tokens=16"]) == 2
    with pytest.raises(ConfigError, match=r"prompt='b{16}': 16 tokens; with max_tokens=1 a prompt .* 1 to 15.*prompt$"):
        generate_texts(GenerateRequest(str(folder), ("b" * 16,)))


def test_by_default_a_text_is_as_long_as_the_model_has_positions(folder: Path) -> None:
    """16 here, fewer than the 64 tokens that a model with more of them draws."""
    (text,) = generate_texts(GenerateRequest(str(folder), ("pool",), temperature=0))
    assert text == generate_texts(GenerateRequest(str(folder), ("pool",), max_tokens=12, temperature=0))[0]
    tokenizer, config = load_tokenizer("bytes"), Config(data=DataConfig(sequence_length=100))
    assert [encode_prompts(["x" * n], tokenizer, config, None)[2] for n in (1, 36, 37, 99)] == [64, 64, 63, 1]


def test_a_changed_tokenizer_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unipool_jax.data.tokenizer.ByteTokenizer.sha256", "another")
    with pytest.raises(RunError, match=r"data\.tokenizer=bytes"):
        generate_texts(GenerateRequest(str(folder), ("x",), max_tokens=2))


def test_greedy_texts_are_those_of_the_checkpoint(folder: Path) -> None:
    """Prompts of different lengths, up to the last position, against the forward pass token by token."""
    prompts = ("pool exp", "é")
    texts = generate_texts(GenerateRequest(str(folder), prompts, max_tokens=8, temperature=0))
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        config = compose_config(overrides(folder.parents[1], "train.steps=10"))
        _, params, balance = restore_model(checkpoints, config, 10)
    step = jax.jit(lambda tokens: forward(config, params, tokens, balance.expert_bias_GNE)[0])
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = list(prompt.encode())
        start = len(tokens)
        for _ in range(8):
            logits = step(np.pad(tokens, (0, 16 - len(tokens)))[None].astype(np.int32))
            tokens.append(int(np.argmax(logits[0, len(tokens) - 1])))
            if tokens[-1] == 256:
                tokens.pop()
                break
        assert text == bytes(tokens[start:]).decode(errors="replace")


def test_the_command_prints_prompts_with_their_texts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"run={folder.parent}/latest", "prompt=pool", "prompt=layer", "max_tokens=5", "seed=3"]
    assert execute(["generate", *words]) == 0
    first = capsys.readouterr().out
    assert first.startswith("pool")
    assert f"\n{'-' * 40}\nlayer" in first
    assert execute(["generate", *words]) == 0
    assert capsys.readouterr().out == first
