"""Command line: generate text with a trained model.

python -m unipool_jax.evaluation.generate prompt="The state of the Union is"
python -m unipool_jax.evaluation.generate run=runs/demo prompt="My fellow" prompt="Congress must" max_tokens=100 seed=1
python -m unipool_jax.evaluation.generate run=runs/demo step=160 prompt="My fellow" temperature=0

`run=latest` is the run with the newest checkpoint. `prompt=` may be repeated; all prompts are generated in one batch. A
text ends at the end of its document or after `max_tokens`. `temperature=0` is greedy decoding; `top_p` is nucleus
sampling; `seed` fixes the random numbers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from unipool_jax.config.parsing import from_mapping
from unipool_jax.config.schema import Config, ConfigError
from unipool_jax.data.tokenizer import Tokenizer, load_tokenizer
from unipool_jax.model.sampling import Sampling, generate
from unipool_jax.moe.lock import score_factors
from unipool_jax.training.checkpoint import Checkpoints, restore_model
from unipool_jax.training.entry import guarded
from unipool_jax.training.run_folder import CHECKPOINTS, RunError, find_run


@dataclass(frozen=True)
class GenerateRequest:
    """What to generate; the command line sets each field by its name."""

    prompts: tuple[str, ...]
    """Texts to continue."""
    run: str = "latest"
    """Folder of a run, or `latest`."""
    step: int | None = None
    """Which checkpoint of the run; None is the newest."""
    max_tokens: int = 64
    """Maximum number of generated tokens per prompt."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most probable token."""
    top_p: float = 0.95
    """Nucleus sampling: draw from the smallest set of tokens with this total probability."""
    seed: int = 0
    """Seed of the random numbers."""


_NUMBERS = {
    "step": (int, "a whole number, 0 or more", lambda value: value >= 0),
    "max_tokens": (int, "a whole number, 1 or more", lambda value: value >= 1),
    "temperature": (float, "0 (the most probable token) or more", lambda value: 0 <= value < math.inf),
    "top_p": (float, "more than 0 and at most 1", lambda value: 0 < value <= 1),
    "seed": (int, "a whole number from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32),
}


def parse_request(arguments: Sequence[str]) -> GenerateRequest:
    """The request that a command line of `NAME=VALUE` words makes; a prompt is taken literally.

    Raises:
      ConfigError: with every word that is not understood or out of range.
    """
    problems: list[str] = []
    prompts: list[str] = []
    found: dict[str, str | int | float] = {}
    for word in arguments:
        name, _, text = word.partition("=")
        if name == "prompt":
            prompts.append(text)
        elif name == "run" and text:
            found[name] = text
        elif name in _NUMBERS:
            kind, allowed, sound = _NUMBERS[name]
            try:
                value = kind(text)
            except ValueError:
                value = math.nan
            if sound(value):
                found[name] = value
            else:
                problems.append(f"{name}={text}: expected {allowed}")
        else:
            names = ", ".join(f"{known}=" for known in ("prompt", "run", *_NUMBERS))
            problems.append(f"{word}: not understood; use {names}")
    if not all(prompts) or not prompts:
        problems.append('prompt=: no text to continue; for example prompt="The state of the Union is"')
    if problems:
        raise ConfigError(problems)
    return GenerateRequest(tuple(prompts), **found)  # type: ignore[arg-type]


def encode_prompts(
    prompts: Sequence[str], tokenizer: Tokenizer, config: Config, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the prompts, int32 `[B, S]` padded with zeros, and their lengths, int32 `[B]`.

    Raises:
      ConfigError: a prompt without tokens, or one that leaves fewer than `max_tokens` of the model's positions.
    """
    rows = tokenizer.encode_batch(prompts)
    room = config.data.sequence_length - max_tokens
    problems = [
        f"prompt={text!r}: {len(row)} tokens; with max_tokens={max_tokens} a prompt can have 1 to {max(room, 0)}, as "
        f"the model was trained on {config.data.sequence_length} positions (data.sequence_length); "
        "shorten the prompt or lower max_tokens"
        for text, row in zip(prompts, rows, strict=True)
        if not 1 <= len(row) <= room
    ]
    if problems:
        raise ConfigError(problems)
    lengths_B = np.array([len(row) for row in rows], np.int32)
    return np.stack([np.pad(row, (0, int(lengths_B.max()) - len(row))) for row in rows]), lengths_B


def generate_texts(request: GenerateRequest) -> list[str]:
    """The continuation of each prompt, without the end-of-document token.

    Raises:
      ConfigError, RunError, CheckpointError, DataError: with what to do about it.
    """
    with Checkpoints(find_run(request.run) / CHECKPOINTS, read_only=True) as checkpoints:
        step = checkpoints.find(request.step)
        meta = checkpoints.meta(step)
        config = from_mapping(meta["config"])
        tokenizer = load_tokenizer(config.data.tokenizer)
        if tokenizer.sha256 != meta["tokenizer_sha256"]:
            raise RunError(
                f"data.tokenizer={config.data.tokenizer}: differs from the tokenizer that {checkpoints.path(step)} was "
                "trained with; restore that one"
            )
        prompts_BS, lengths_B = encode_prompts(request.prompts, tokenizer, config, request.max_tokens)
        config, params, balance = restore_model(checkpoints, config, step)
    sampling = Sampling(tokenizer.vocab_size, tokenizer.eod, request.max_tokens, request.temperature, request.top_p)
    key, factors = jax.random.key(request.seed), score_factors(config, balance.lock)
    generated = jax.device_get(
        generate(config, params, balance.expert_bias_GNE, prompts_BS, lengths_B, key, sampling, factors)
    )
    rows = [
        tokens[start:end]
        for tokens, start, end in zip(generated.tokens_BT, lengths_B, generated.lengths_B, strict=True)
    ]
    return [tokenizer.decode(row[row != tokenizer.eod]) for row in rows]


def generate_command(arguments: Sequence[str]) -> int:
    """Generate as the command line says and print each prompt with what follows it; raises as `generate_texts`."""
    request = parse_request(arguments)
    for number, (prompt, text) in enumerate(zip(request.prompts, generate_texts(request), strict=True)):
        if number:
            print("-" * 40)
        print(prompt + text)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: generate_command(sys.argv[1:])))
